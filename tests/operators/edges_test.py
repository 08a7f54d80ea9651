# SPDX-License-Identifier: Apache-2.0
"""Both implementations at the edges of what they take: no dropout mask, mixed dtypes, no keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.blocks.layers import DropPath
from localglobal_jax.parallel import context

IMPLEMENTATIONS = ("reference", "fused")
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def heads(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@each
@pytest.mark.parametrize(
    "module",
    [
        lg.operators.SelfAttention(8, 2),
        lg.operators.MuseSequence(8, 2, 8, windows=(3, 9)),
        lg.operators.DynamicConv(8, 2, 9),
        lg.operators.AdaptiveConv(8, 2, window=9),
        lg.operators.EquivariantSequence(8, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_sequence_without_positions(module, implementation):
    variables = module.init(jax.random.key(0), heads(1, 5, 8))
    with context.implementation(implementation):
        assert module.apply(variables, heads(2, 0, 8)).shape == (2, 0, 8)


@each
def test_a_depthwise_convolution_of_four_axes_of_space(implementation):
    x, kernel = heads(1, 3, 3, 3, 3, 2), heads(3, 3, 3, 3, 2, seed=1)
    with context.implementation(implementation):
        found = lg.operators.depthwise(x, kernel)
    np.testing.assert_allclose(found[0, 1, 1, 1, 1], (x[0] * kernel).sum((0, 1, 2, 3)), rtol=1e-4)


@each
def test_a_rate_without_a_mask_changes_nothing(implementation):
    q, k, v = (heads(1, 3, 2, 4, seed=i) for i in range(3))
    with context.implementation(implementation):
        found, plain = lg.operators.attend(q, k, v, dropout=0.5), lg.operators.attend(q, k, v)
    np.testing.assert_array_equal(found, plain)


@each
def test_a_rate_of_one_gives_zeros_and_finite_gradients(implementation):
    module = lg.operators.SelfAttention(16, 2, dropout=1.0)
    x, key = heads(2, 12, 16), jax.random.key(0)
    variables = module.init(key, x)

    def total(variables):
        y = module.apply(variables, x, train=True, rngs={"dropout": key})
        return jnp.sum(y), y

    with context.implementation(implementation):
        (_, y), gradient = jax.value_and_grad(total, has_aux=True)(variables)
    np.testing.assert_array_equal(y, 0)  # the bias of the output is 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_drop_path_of_rate_one_gives_zeros():
    def total(x):
        return DropPath(1.0).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}).sum()

    assert total(jnp.ones((2, 3))) == 0
    assert not np.any(jax.grad(total)(jnp.ones((2, 3))))


@each
def test_every_gradient_of_attention_has_the_dtype_of_its_input(implementation):
    q, k, v = heads(1, 9, 2, 8, dtype=jnp.bfloat16), heads(1, 9, 2, 8, seed=1), heads(1, 9, 2, 8)
    projection = heads(16, 16, dtype=jnp.bfloat16, seed=2)

    def total(q, k, v, projection):
        q = (q.reshape(1, 9, 16) @ projection).reshape(q.shape)
        return lg.operators.attend(q, k, v).astype(jnp.float32).sum()

    inputs = q, k, v, projection
    with context.implementation(implementation):
        found = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*inputs)
    assert [x.dtype for x in found] == [x.dtype for x in inputs]


@each
def test_a_depthwise_convolution_takes_a_kernel_of_another_dtype(implementation):
    x, kernel = heads(1, 6, 6, 4), heads(3, 3, 4, dtype=jnp.bfloat16, seed=1)

    def total(x, kernel):
        return lg.operators.depthwise(x, kernel).astype(jnp.float32).sum()

    with context.implementation(implementation):
        y = lg.operators.depthwise(x, kernel)
        found = jax.jit(jax.grad(total, (0, 1)))(x, kernel)
    assert y.dtype == jnp.float32
    assert [leaf.dtype for leaf in found] == [jnp.float32, jnp.bfloat16]


@each
@pytest.mark.parametrize("kind", ["dynamic", "depthwise", "standard"])
def test_a_convolution_of_values_has_the_dtype_of_the_module(kind, implementation):
    module = lg.operators.SharedValueConv(heads=2, kind=kind, dtype="bfloat16")
    with context.implementation(implementation):
        y, _ = module.init_with_output(jax.random.key(0), heads(1, 6, 6, 4))
    assert y.shape[:3] == (1, 6, 6) and (kind == "dynamic" or y.dtype == jnp.bfloat16)


@each
def test_attention_without_keys_is_zero(implementation):
    q, nothing = heads(1, 3, 2, 4), jnp.ones((1, 0, 2, 4))
    with context.implementation(implementation):
        assert not np.any(lg.operators.attend(q, nothing, nothing))


@pytest.mark.parametrize(("length", "grid"), [(3, 4), (4, 3)])
def test_a_table_of_another_grid_is_refused(length, grid):
    table = jnp.arange(2.0 * length - 1).reshape(1, -1, 1)
    with pytest.raises(ValueError, match=f"grid of 1 x {grid}"):
        lg.operators.relative_bias(table, 1, grid)


@each
@pytest.mark.parametrize("padding", [((0, 0),), ((2, 2),), ((5, 4),)])
def test_a_dynamic_convolution_has_a_kernel_per_position(padding, implementation):
    x, kernel = heads(1, 12, 4), heads(1, 12, 2, 9)
    with context.implementation(implementation), pytest.raises(ValueError, match="padding"):
        lg.operators.dynamic(x, kernel, window=(9,), padding=padding)


def test_an_even_window_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"^windows \(4,\)"):
        lg.operators.DynamicConv(16, 2, window=4).init(jax.random.key(0), heads(1, 6, 16))
