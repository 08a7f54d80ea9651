# SPDX-License-Identifier: Apache-2.0
"""Schedules, optimizers, which parameters decay, and their moving average.

Everything is a pure function of the options and the step; the options are `schema.Optim`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from localglobal_jax.config import schema
from localglobal_jax.training.freezing import path_of

PyTree = Any
# Places of layers in the order of the computation: (part, stage, block)
STEM, HEAD = (0, 0, 0), (9, 0, 0)
KERNEL = re.compile(r"kernel\d*")  # of several windows each has its size in the name
BEFORE = r"stem/|position$|head/class_token$|(source_|target_)?embedding/"


def make_schedule(options: schema.Optim, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already made.

    Linear from ``init_learning_rate`` to ``learning_rate`` over ``warmup_steps`` (from 0, the first
    update moves nothing), then: ``cosine`` to ``end_learning_rate`` at ``steps`` (arXiv 1608.03983,
    one cycle); ``linear`` to it; ``constant``; or ``rsqrt``, peak * sqrt(warmup / step) (arXiv
    1706.03762, section 5.3).

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
    elif options.schedule == "linear":
        after = optax.linear_schedule(peak, end, max(steps - warmup, 1))
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
    """True for the leaves that weight decay shrinks: named ``kernel`` or ``kernel7``, not vectors.

    The name decides, so everything else is spared without a list to maintain: ``bias``, ``scale``
    (norms, LayerScale), embeddings, position and relative-position tables, gates, class tokens.
    A module that wants decay on a matrix calls it ``kernel``.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return KERNEL.fullmatch(name) is not None and jnp.ndim(leaf) >= 2

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
        *([_scale_layers(options.layer_decay)] if options.layer_decay < 1 else []),
    )


def layer_numbers(params: PyTree) -> tuple[dict[str, int], int]:
    """Returns the number of the layer of every parameter, and that of the head.

    The stem is 0, blocks are 1 to n, the head is n + 1.

    As in BEiT (arXiv 2106.08254) and timm: position embeddings, class token and the embeddings of
    tokens (also a table that is shared with the logits) belong to the stem. A layer that changes
    width between stages belongs to the block after it. The encoder's last norm belongs to its last
    layer, the decoder follows the encoder. Norms after the last block, the classifier and a
    separate table of logits are the head.

    Args:
      params: arrays or shapes; None in place of frozen leaves.

    Raises ValueError for a model without numbered blocks.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: x is None)
    places = {path_of(path): _place(path_of(path)) for path, _ in leaves}
    encoder = [place for place in places.values() if place[0] == 2]
    if encoder and any(path.startswith("decoder/") for path in places):
        places |= {path: max(encoder) for path in places if path.startswith("encoder/norm/")}
    blocks = sorted({*places.values()} - {STEM, HEAD})
    if not blocks:
        raise ValueError(
            "optim.layer_decay: this model has no numbered blocks, so that its layers have no "
            "order. Set optim.layer_decay=1"
        )
    numbers = {STEM: 0, HEAD: len(blocks) + 1} | {p: i for i, p in enumerate(blocks, start=1)}
    return {path: numbers[place] for path, place in places.items()}, numbers[HEAD]


def _place(path: str) -> tuple[int, int, int]:
    if re.match(BEFORE, path):
        return STEM
    if found := re.match(r"(?:stage(\d+)/(?:block(\d+)|downsample)|downsample(\d+))/", path):
        return 1, int(found[1] or found[3]), int(found[2] or 1)
    if found := re.match(r"(encoder|decoder|head)/(?:layer|block)(\d+)/", path):
        return 2 if found[1] == "encoder" else 3, 0, int(found[2])
    return HEAD


def layer_rates(params: PyTree, decay: float) -> PyTree:
    """Returns the factor of each parameter's learning rate: decay^(distance from the head).

    The tree is that of `params`, see `layer_numbers`, with None where that has None.
    """
    numbers, head = layer_numbers(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay ** (head - numbers[path_of(path)]), params
    )


def layer_summary(params: PyTree, options: schema.Optim) -> str:
    """Returns ``"14 (stem, 12 blocks, head): learning rate 2.4e-05 (stem) to 0.001 (head)"``."""
    _, count = layer_numbers(params)
    rate = options.learning_rate
    lowest = rate * options.layer_decay**count
    return (
        f"{count + 1} (stem, {count - 1} blocks, head): learning rate {lowest:.3g} (stem) to "
        f"{rate:.3g} (head)"
    )


def _scale_layers(decay: float) -> optax.GradientTransformation:
    """Multiplies the updates, decay of weights included, by `layer_rates`; keeps no state."""

    def update(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda u, rate: u * rate, updates, layer_rates(params, decay))

    return optax.stateless(update)


def ema(average: PyTree, params: PyTree, decay: float, step: Any) -> PyTree:
    """Exponential moving average of the parameters after the update number ``step`` (from 0).

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run's average is
    not still its initialisation. Leaves keep the dtype of ``average``.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: (a + rate * (p - a)).astype(a.dtype), average, params)
