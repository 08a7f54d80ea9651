# SPDX-License-Identifier: Apache-2.0
"""Content-adaptive convolution and translation-equivariant attention against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.operators.adaptive import (
    AdaptiveConv,
    EquivariantAttention,
    adaptive_convolution,
    cyclic_bias,
)
from localglobal_jax.operators.attention import attend

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def by_equation(query, key, value, bias, before):
    """One position at a time, in float64."""
    window, space = bias.shape[:-1], query.shape[:-2]
    out = np.zeros((*space, *value.shape[-2:]))
    for i in np.ndindex(*space):
        logits, values = [], []
        for o in np.ndindex(*window):
            j = tuple(np.add(i, o) - before)
            if all(0 <= a < n for a, n in zip(j, space, strict=True)):
                logits.append((query[i] * key[j]).sum(-1) * query.shape[-1] ** -0.5 + bias[o])
                values.append(value[j])
        weights = np.exp(logits - np.max(logits, 0))
        weights /= weights.sum(0)
        out[i] = (weights[..., None] * np.stack(values)).sum(0)
    return out


@pytest.mark.parametrize(
    ("space", "window", "causal"),
    [((5, 7), (3, 3), False), ((4, 4), (5, 3), False), ((9,), (4,), False), ((9,), (3,), True)],
)
def test_equals_the_equation(space, window, causal):
    query, key, value = (normal(1, *space, 2, 3) for _ in range(3))
    bias = normal(*window, 2)
    y = adaptive_convolution(query, key, value, bias, causal=causal)
    before = np.array([k - 1 if causal else k // 2 for k in window])
    arrays = (np.asarray(a[0], np.float64) for a in (query, key, value))
    expected = by_equation(*arrays, np.asarray(bias), before)
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


def test_mask_takes_all_weight_away():
    query, key, value = (normal(2, 8, 1, 4) for _ in range(3))
    mask = jnp.arange(8)[None] < jnp.array([[8], [5]])
    bias = normal(3, 1)
    y = adaptive_convolution(query, key, value, bias, mask=mask)
    poisoned = jnp.where(mask[..., None, None], value, 1e6)
    np.testing.assert_allclose(
        adaptive_convolution(query, key, poisoned, bias, mask=mask)[1, :5], y[1, :5], atol=1e-6
    )
    alone = adaptive_convolution(query[1:, :5], key[1:, :5], value[1:, :5], bias)
    np.testing.assert_allclose(y[1, :5], alone[0], atol=1e-6)


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([10.0, 1e3, 1e5]))
def test_large_logits_stay_finite(scale):
    query, value = scale * normal(1, 4, 4, 1, 2), normal(1, 4, 4, 1, 2)
    y, grad = jax.value_and_grad(
        lambda q: adaptive_convolution(q, q, value, jnp.zeros((3, 3, 1))).sum()
    )(query)
    assert np.isfinite(y) and bool(jnp.isfinite(grad).all())
    assert abs(y) <= float(jnp.abs(value).max()) * value.size


def test_a_window_over_everything_is_attention():
    query, key, value = (normal(1, 3, 4, 2, 5) for _ in range(3))
    y = adaptive_convolution(query, key, value, jnp.zeros((7, 7, 2)))
    flat = (a.reshape(1, 12, 2, 5) for a in (query, key, value))
    np.testing.assert_allclose(y.reshape(1, 12, 2, 5), attend(*flat), atol=1e-5)


def test_wrong_windows_are_refused():
    q = normal(1, 4, 4, 2, 3)
    with pytest.raises(ValueError, match="bias"):
        adaptive_convolution(q, q, q, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="causal"):
        AdaptiveConv(4, heads=2, causal=True).init(jax.random.key(0), normal(1, 4, 4, 4))


def test_cyclic_bias_is_the_displacement_modulo_the_grid():
    h, w = 3, 4
    table = normal(h, w, 2)
    bias = np.asarray(cyclic_bias(table))
    for q in range(h * w):
        for k in range(h * w):
            dy, dx = (q // w - k // w) % h, (q % w - k % w) % w
            np.testing.assert_array_equal(bias[:, q, k], table[dy, dx])


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 5), st.integers(0, 3))
def test_equivariant_attention_commutes_with_every_cyclic_shift(dy, dx):
    module, x = EquivariantAttention(8, heads=2), normal(2, 6, 4, 8)
    variables = module.init(jax.random.key(0), x)
    variables["params"]["bias"] = normal(6, 4, 2)
    run = jax.jit(module.apply)
    moved = run(variables, jnp.roll(x, (dy, dx), (1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(run(variables, x), (dy, dx), (1, 2)), atol=1e-5)
