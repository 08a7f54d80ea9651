# SPDX-License-Identifier: Apache-2.0
"""Schedules, optimizers, which parameters decay, and their moving average.

Everything is a pure function of the options and the step; the options are `schema.Optim`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from localglobal_jax.config import schema

PyTree = Any


def make_schedule(options: schema.Optim, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already made.

    Linear from ``init_learning_rate`` to ``learning_rate`` over ``warmup_steps`` (from 0, the first
    update moves nothing), then: ``cosine`` to ``end_learning_rate`` at ``steps`` (arXiv 1608.03983,
    one cycle); ``constant``; or ``rsqrt``, peak * sqrt(warmup / step) (arXiv 1706.03762, section
    5.3).

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    peak, end, warmup = options.learning_rate, options.end_learning_rate, options.warmup_steps
    if warmup > steps:
        raise ValueError(
            f"optim.warmup_steps={warmup} is longer than the run (steps={steps}): the learning "
            f"rate would never reach its peak. Use at most {steps}."
        )

    after: optax.Schedule
    if options.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=end / peak)
    elif options.schedule == "rsqrt":
        first = max(warmup, 1)  # optax has no such schedule; `count` begins after the warm-up
        after = lambda count: peak * jnp.sqrt(first / jnp.maximum(count + warmup, first))  # noqa: E731
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    before = optax.linear_schedule(options.init_learning_rate, peak, warmup)
    return optax.join_schedules([before, after], [warmup])


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay shrinks: those named ``kernel`` with >= 2 dimensions.

    The name decides, so everything else is spared without a list to maintain: ``bias``, ``scale``
    (norms, LayerScale), embeddings, position and relative-position tables, gates, class tokens.
    A module that wants decay on a matrix calls it ``kernel``.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name == "kernel" and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(options: schema.Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, AdamW (arXiv 1711.05101) or SGD with momentum, decoupled decay, rate.

    The decay is multiplied by the scheduled learning rate, as in PyTorch and optax; SGD's is
    decoupled too: it never enters the momentum.
    """
    if options.name == "adamw":
        direction = optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps)
    else:
        direction = optax.trace(options.momentum) if options.momentum else optax.identity()
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(options.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(options, steps)),
    )


def ema(average: PyTree, params: PyTree, decay: float, step: Any) -> PyTree:
    """Exponential moving average of the parameters after the update number ``step`` (from 0).

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run's average is
    not still its initialisation. Leaves keep the dtype of ``average``.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: (a + rate * (p - a)).astype(a.dtype), average, params)
