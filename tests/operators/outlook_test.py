# SPDX-License-Identifier: Apache-2.0
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from localglobal_jax.operators import outlook


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def naive(value, logits, stride):
    """The definition, one window, head and position at a time."""
    value, logits = np.asarray(value, np.float64), np.asarray(logits, np.float64)
    b, h, w, n, c = value.shape
    k = round(logits.shape[-1] ** 0.5)
    out = np.zeros_like(value)
    for e, i, j, head in np.ndindex(b, *logits.shape[1:3], n):
        places = [
            (i * stride + y - k // 2, j * stride + x - k // 2) for y in range(k) for x in range(k)
        ]
        inside = [0 <= y < h and 0 <= x < w for y, x in places]
        seen = np.stack(
            [
                value[(e, *at, head)] if ok else np.zeros(c)
                for at, ok in zip(places, inside, strict=True)
            ]
        )
        weights = np.exp(logits[e, i, j, head] / np.sqrt(c))
        answers = weights / weights.sum(-1, keepdims=True) @ seen
        for at, ok, answer in zip(places, inside, answers, strict=True):
            if ok:
                out[(e, *at, head)] += answer
    return out


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 4),
    heads=st.integers(1, 2),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_equals_the_loop_over_windows(size, window, stride, heads):
    windows = [-(-n // stride) for n in size]
    value, logits = arrays((2, *size, heads, 3), (2, *windows, heads, window**2, window**2))
    y = jax.jit(outlook.outlook, static_argnames="stride")(value, logits, stride=stride)
    np.testing.assert_allclose(y, naive(value, logits, stride), atol=1e-5)


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 4),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_fold_is_the_transpose_of_unfold(size, window, stride):
    windows = tuple(-(-n // stride) for n in size)
    (x,) = arrays((1, *size, 2))
    parts = arrays(*[(1, *windows, 2)] * window**2, seed=1)
    options = {"window": window, "stride": stride}
    seen = jax.jit(lambda x: outlook.unfold(x, windows, **options))(x)
    there = sum(np.vdot(a, b) for a, b in zip(seen, parts, strict=True))
    back = np.vdot(x, jax.jit(lambda parts: outlook.fold(parts, size, **options))(parts))
    np.testing.assert_allclose(there, back, atol=1e-4)


def test_zeros_outside_take_their_share_and_overlaps_add_up():
    value = jnp.ones((1, 4, 4, 1, 1))
    y = outlook.outlook(value, jnp.zeros((1, 2, 2, 1, 9, 9)), stride=2)[0, :, :, 0, 0]
    np.testing.assert_allclose(y[0, 0], 4 / 9, rtol=1e-6)  # one window, 4 of 9 positions inside
    np.testing.assert_allclose(y[0, 1], 4 / 9 + 6 / 9, rtol=1e-6)  # two windows, summed


def test_neither_gathers_nor_scatters_forward_and_backward():
    value, logits = arrays((1, 5, 6, 2, 4), (1, 3, 3, 2, 9, 9))
    loss = lambda v, a: outlook.outlook(v, a, stride=2).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(value, logits))
    assert "dot_general" in text
    assert not re.search(r"gather|scatter|dynamic", text)


@pytest.mark.parametrize(
    ("window", "stride", "radius"), [(3, 1, 2), (3, 2, 2), (3, 3, 3), (3, 4, 4), (5, 2, 4)]
)
@pytest.mark.parametrize("size", [(9, 8)])
def test_local_reach_is_what_the_jacobian_says(window, stride, radius, size):
    module = outlook.Outlook(heads=1, window=window, stride=stride)
    (x,) = arrays((1, *size, 2))
    variables = jax.tree.map(lambda a: a * 30, module.init(jax.random.key(1), x))
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(variables, x)[0].sum(-1)))(x)[:, :, 0]
    moved = np.abs(jacobian).sum(-1)  # [output y, x, input y, x]
    ys, xs, yi, xi = np.indices(moved.shape)
    distance = np.maximum(abs(ys - yi), abs(xs - xi))
    assert (module.reach.name, module.reach.radius) == ("LOCAL", radius)
    assert not moved[distance > radius].any()
    assert moved[distance == radius].any(), "the radius is declared too large"


def test_windows_cut_by_the_border_average_the_positions_they_have():
    module = outlook.Outlook(heads=2)
    (x,) = arrays((1, 5, 3, 4))
    variables = module.init(jax.random.key(0), x)
    _, state = module.apply(variables, x, capture_intermediates=True)
    logits = state["intermediates"]["weights"]["__call__"][0]
    kernel = variables["params"]["weights"]["kernel"]
    for (i, j), cell in {(0, 0): x[0, :2, :2], (2, 0): x[0, 4:, :2], (2, 1): x[0, 4:, 2:]}.items():
        mean = np.asarray(cell).reshape(-1, 4).mean(0)
        np.testing.assert_allclose(logits[0, i, j], np.tensordot(mean, kernel, 1), atol=1e-6)


def test_half_precision_keeps_its_dtype_and_stays_close():
    value, logits = arrays((1, 6, 6, 2, 8), (1, 3, 3, 2, 9, 9))
    y = outlook.outlook(value.astype(jnp.bfloat16), logits.astype(jnp.bfloat16), stride=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), outlook.outlook(value, logits, stride=2), atol=0.05
    )


@pytest.mark.parametrize("shape", [(1, 2, 3, 1, 9, 9), (1, 3, 3, 1, 9, 4), (1, 3, 3, 1, 4, 4)])
def test_logits_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="outlook"):
        outlook.outlook(jnp.zeros((1, 5, 5, 1, 2)), jnp.zeros(shape), stride=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "width 4 .*3 heads"),
        ({"heads": 2, "window": 4}, "window=4"),
        ({"heads": 2, "stride": 0}, "stride=0"),
    ],
)
def test_modules_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        outlook.Outlook(**fields).init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))


def test_a_fold_takes_one_part_for_every_position():
    with pytest.raises(ValueError, match="zip"):
        outlook.fold([jnp.ones((1, 3, 3, 1))] * 8, (3, 3), window=3, stride=1)
