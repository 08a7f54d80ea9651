# SPDX-License-Identifier: Apache-2.0
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.operators import attention
from localglobal_jax.operators.kernels import attention as kernels
from localglobal_jax.parallel import context


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def test_attend_is_the_textbook_sum():
    q, k, v = arrays((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 6))
    (bias,) = arrays((4, 3, 5))
    y = attention.attend(q, k, v, bias=bias)
    for b in range(2):
        for n in range(4):
            logits = np.asarray(q[b, :, n] @ k[b, :, n].T) / np.sqrt(8) + np.asarray(bias[n])
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            np.testing.assert_allclose(y[b, :, n], weights @ np.asarray(v[b, :, n]), atol=1e-5)


def test_masked_keys_get_no_weight_and_no_gradient():
    q, k, v = arrays((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4))
    mask = jnp.array([True, False, True, True, False]).reshape(1, 1, 1, 5)
    grad = jax.grad(lambda v: attention.attend(q, k, v, mask=mask).sum())(v)
    seen = np.abs(np.asarray(grad)).sum((0, 2, 3)) > 0
    np.testing.assert_array_equal(seen, mask.reshape(-1))


def test_softmax_is_float32_and_the_output_keeps_its_dtype():
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4)))
    assert attention.attention_weights(q, k).dtype == jnp.float32
    assert attention.attend(q, k, v).dtype == jnp.bfloat16


def test_relative_bias_depends_on_the_displacement_only():
    h, w = 3, 4
    (table,) = arrays((2 * h - 1, 2 * w - 1, 2))
    bias = attention.relative_bias(table, h, w).reshape(2, h, w, h, w)
    for qy, qx, ky, kx in [(0, 0, 0, 0), (2, 3, 0, 0), (0, 1, 2, 3), (1, 2, 1, 0)]:
        expected = table[qy - ky + h - 1, qx - kx + w - 1]
        np.testing.assert_array_equal(bias[:, qy, qx, ky, kx], expected)


def test_weights_are_sown_as_attention():
    q, k, v = arrays((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8))
    y, sown = attention.Attend().apply({}, q, k, v, mutable=["intermediates"])
    (weights,) = sown["intermediates"]["attention"]
    np.testing.assert_allclose(
        y, jnp.einsum("bnlm,bmnc->blnc", weights, v).reshape(2, 3, 32), atol=1e-6
    )
    (x,) = arrays((1, 4, 5, 8))
    module = attention.RelativeAttention(heads=2)
    _, sown = module.apply(module.init(jax.random.key(1), x), x, mutable=["intermediates"])
    (weights,) = sown["intermediates"]["attention"]
    assert weights.shape == (1, 2, 20, 20)


@pytest.mark.parametrize("bias", ["table", "mlp", "none"])
def test_global_reach_is_what_the_jacobian_says(bias):
    module = attention.RelativeAttention(heads=2, bias=bias, bias_hidden=8)
    (x,) = arrays((1, 4, 5, 8))
    variables = module.init(jax.random.key(1), x)
    jacobian = jax.jacrev(lambda x: module.apply(variables, x)[0, 1, 1].sum())(x)
    assert module.reach.name == "GLOBAL"
    assert np.all(np.abs(jacobian[0]).sum(-1) > 0)


def test_plain_attention_does_not_know_where_things_are():
    module = attention.RelativeAttention(heads=2, bias="none")
    (x,) = arrays((1, 3, 4, 8))
    variables = module.init(jax.random.key(1), x)
    order = np.random.default_rng(0).permutation(12)

    def shuffled(x):
        return x.reshape(1, 12, 8)[:, order].reshape(1, 3, 4, 8)

    np.testing.assert_allclose(
        module.apply(variables, shuffled(x)), shuffled(module.apply(variables, x)), atol=1e-5
    )


def test_mlp_bias_works_at_another_resolution():
    module = attention.RelativeAttention(heads=2, bias="mlp", bias_hidden=8)
    small, large = arrays((1, 3, 3, 8), (1, 5, 6, 8))
    variables = module.init(jax.random.key(1), small)
    assert module.apply(variables, large).shape == (1, 5, 6, 8)


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"8.*3 heads"):
        attention.RelativeAttention(heads=3).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_logits_made_twice_are_those_made_once(dtype):
    """What runs on TPU against what runs elsewhere."""
    with jax.enable_x64(dtype == "float64"):
        keys = jax.random.split(jax.random.key(0), 3)
        query = jax.random.normal(keys[0], (2, 4, 3, 5, 8), dtype)  # two axes in front
        key = jax.random.normal(keys[1], (2, 4, 3, 7, 8), dtype)
        bias = jax.random.normal(keys[2], (4, 3, 5, 7), dtype)
        mask = (jnp.arange(7) < 6)[None, None, None, None]
        once = kernels.numerator(query, key, bias, mask)
        twice = jax.jit(partial(kernels.numerator, twice=True))(query, key, bias, mask)
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_axes_in_front(dtype):
    """Windows of windows: one bias for all images, and the gradients of the plain form."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = ((2, 3, 5, 2, 8), (2, 3, 7, 2, 8), (2, 3, 7, 2, 8), (3, 2, 5, 7))
    inputs = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]

    def loss(query, key, value, bias):
        return (attention.attend(query, key, value, bias=bias).astype("float32") ** 2).sum()

    reference = jax.value_and_grad(loss, (0, 1, 2, 3))(*inputs)
    with context.implementation("fused"):
        fused = jax.value_and_grad(loss, (0, 1, 2, 3))(*inputs)
    tolerance = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(reference), strict=True):
        assert a.dtype == b.dtype
        wide = np.asarray(b, "float32")
        np.testing.assert_allclose(np.asarray(a, "float32"), wide, atol=tolerance * abs(wide).max())
