# SPDX-License-Identifier: Apache-2.0
"""Schedules against their formulas, optimizers against a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localglobal_jax.config import schema
from localglobal_jax.models.registry import create_model
from localglobal_jax.training import optim

SHAPES = {
    "stem": {"kernel": (3, 3, 1, 2), "bias": (2,)},
    "norm": {"scale": (2,), "bias": (2,)},
    "attention": {"query": {"kernel": (2, 2)}, "relative_position": (3, 3), "gate": (2, 2)},
    "position": {"embedding": (4, 2)},
    "conv": {"kernel": (3,)},
}


def filled(seed):
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "rsqrt"])
def test_schedule_warms_up_to_the_peak_and_never_exceeds_it(name):
    options = schema.Optim(learning_rate=0.5, schedule=name, warmup_steps=10, end_learning_rate=0.1)
    rates = np.array([optim.make_schedule(options, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.5, 11), rtol=1e-6)
    assert rates.max() == rates[10]
    assert (np.diff(rates[10:]) <= 0).all()
    end = {"cosine": 0.1, "linear": 0.1, "constant": 0.5, "rsqrt": 0.5 * np.sqrt(0.1)}[name]
    np.testing.assert_allclose(rates[100], end, rtol=1e-6)


def test_cosine_is_halfway_in_the_middle_and_stays_at_its_end():
    schedule = optim.make_schedule(schema.Optim(learning_rate=1.0, end_learning_rate=0.2), 50)
    np.testing.assert_allclose([schedule(0), schedule(25), schedule(70)], [1, 0.6, 0.2], rtol=1e-6)


def closed_form(options, steps, count):
    """The rate after `count` updates, in float64."""
    warmup, peak = options.warmup_steps, options.learning_rate
    first, end = options.init_learning_rate, options.end_learning_rate
    if count < warmup:
        return first + (peak - first) * count / warmup
    if options.schedule == "cosine":
        done = min((count - warmup) / max(steps - warmup, 1), 1)
        return end + (peak - end) * (1 + np.cos(np.pi * done)) / 2
    if options.schedule == "linear":
        return peak + (end - peak) * min((count - warmup) / max(steps - warmup, 1), 1)
    if options.schedule == "rsqrt":
        return peak * np.sqrt(max(warmup, 1) / max(count, warmup, 1))
    return peak


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "rsqrt"])
@pytest.mark.parametrize("steps", [1, 10, 300_000])
@pytest.mark.parametrize("warmup", [0, 1, 7, 10_000])
@pytest.mark.parametrize("first", [0.0, 1e-5, 0.9])
@pytest.mark.parametrize("end", [0.0, 0.01, 0.7])
def test_schedule_equals_its_closed_form(name, steps, warmup, first, end):
    warmup = min(warmup, steps)
    options = schema.Optim(
        learning_rate=0.5,
        schedule=name,
        warmup_steps=warmup,
        init_learning_rate=first,
        end_learning_rate=end,
    )
    counts = sorted(
        {0, 1, 2, warmup, warmup + 1, steps // 3, steps // 2, steps - 1, steps, 2 * steps}
    )
    rates = jax.jit(jax.vmap(optim.make_schedule(options, steps)))(jnp.array(counts))
    expected = [closed_form(options, steps, count) for count in counts]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=2e-7)


def test_schedule_takes_a_traced_step():
    schedule = optim.make_schedule(schema.Optim(warmup_steps=3), 10)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.array(2)), schedule(2), rtol=1e-6)


def test_warmup_longer_than_the_run_is_refused():
    optim.make_schedule(schema.Optim(warmup_steps=10), 10)
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=11"):
        optim.make_schedule(schema.Optim(warmup_steps=11), 10)


def test_only_matrices_named_kernel_decay():
    mask = optim.decay_mask(filled(0))
    decayed = [jax.tree_util.keystr(p) for p, on in jax.tree.leaves_with_path(mask) if on]
    assert decayed == ["['attention']['query']['kernel']", "['stem']['kernel']"]


@pytest.mark.parametrize("kind", ["dynamic", "depthwise", "standard"])
@pytest.mark.parametrize("letter", "MD")
def test_kernels_of_every_kind_of_convolution_decay(letter, kind):
    options = {"windows": (3, 7)} if letter == "M" else {"window": 3}
    module = create_model(
        "muse",
        layout=letter * 2,
        depths=(2, 2),
        widths=(8, 8),
        heads=(2, 2),
        hidden=(8, 8),
        blocks={letter: {"kind": kind, **options}},
    )
    tokens = jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]
    kernels = {
        jax.tree_util.keystr(path): decays
        for path, decays in jax.tree.leaves_with_path(optim.decay_mask(params))
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert len([name for name in kernels if "kernel3" in name]) == 4
    assert all(kernels.values())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_equal_the_formulas(name):
    options = schema.Optim(
        name=name, learning_rate=0.1, schedule="constant", weight_decay=0.3, clip_norm=1.0
    )
    params, optimizer = filled(0), optim.make_optimizer(options, 10)
    state = optimizer.init(params)
    mask = optim.decay_mask(params)
    first = jax.tree.map(jnp.zeros_like, params)
    second, expected = first, params
    for t in (1, 2, 3):
        grads = filled(t)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        assert norm > 1  # so that clipping is seen
        grads = jax.tree.map(lambda g, n=norm: g / n, grads)
        if name == "adamw":
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
            step = jax.tree.map(
                lambda m, v, n=t: m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8),
                first,
                second,
            )
        else:
            step = first = jax.tree.map(lambda m, g: 0.9 * m + g, first, grads)
        expected = jax.tree.map(lambda p, s, on: p - 0.1 * (s + 0.3 * p * on), expected, step, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected)


def test_without_clipping_sgd_is_plain():
    options = schema.Optim(
        name="sgd", momentum=0.0, clip_norm=0.0, learning_rate=0.5, schedule="constant"
    )
    optimizer = optim.make_optimizer(options, 10)
    params, grads = filled(0), jax.tree.map(lambda g: 100 * g, filled(1))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * g, rtol=1e-6), updates, grads)


def test_ema_warms_up_and_then_holds_its_decay():
    average, params = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    for step, rate in ((0, 0.9), (8, 0.5), (10**6, 0.01)):
        moved = optim.ema(average, params, 0.99, step)
        np.testing.assert_allclose(moved["a"], rate, rtol=1e-5)
    half = optim.ema({"a": jnp.zeros(2, jnp.bfloat16)}, params, 0.5, jnp.array(0))
    assert half["a"].dtype == jnp.bfloat16
