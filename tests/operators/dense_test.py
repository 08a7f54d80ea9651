# SPDX-License-Identifier: Apache-2.0
"""The product of matrices is the product that was asked for, in every form and in its gradients."""

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from localglobal_jax.operators import dense
from localglobal_jax.parallel import context

SIZES = st.integers(1, 4)


@pytest.fixture(autouse=True, scope="module")
def fused():
    """The reference is `lax.dot_general` itself."""
    with context.implementation("fused"):
        yield


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(SIZES, max_size=3),
    d=SIZES,
    columns=st.lists(SIZES, min_size=1, max_size=3),
)
def test_it_is_lax_dot_general_forward_and_backward(rows, d, columns):
    random = np.random.default_rng(len(rows) + d)
    x = jnp.asarray(random.normal(size=(*rows, d)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(d, *columns)), jnp.float32)

    def given_as(dot):
        def loss(x, kernel):
            return jnp.sin(dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))).sum()

        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        given_as(dense.dot_general),
        given_as(lax.dot_general),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["cuda", "default"])
def test_logits_and_their_gradients_are_those_of_the_plain_product(form, dtype, monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, **forms: forms[form](*args))
    random = np.random.default_rng(0)
    x, table = (jnp.asarray(random.normal(size=s), dtype) for s in ((2, 16, 8), (32, 8)))

    def loss(product):
        def total(x, table):
            logits = product(x, table)
            assert logits.dtype == jnp.float32
            return jax.nn.logsumexp(logits, -1).sum(), logits

        (_, logits), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, table)
        return logits, *gradients

    def plain(x, table):
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)

    for a, b in zip(loss(dense.wide_product), loss(plain), strict=True):
        assert a.dtype == b.dtype
        error = jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b)
        assert error <= (1e-6 if dtype == "float32" else 2**-8)  # half a unit of bfloat16's


def test_other_sums_and_batches_are_left_alone():
    x, y = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5))
    numbers = (((1,), (1,)), ((0,), (0,)))
    assert dense.dot_general(x, y, numbers).shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dense.Dense(5, name="a"), nn.Dense(5, name="a")),
        (dense.DenseGeneral((2, 3), name="a"), nn.DenseGeneral((2, 3), name="a")),
        (
            dense.DenseGeneral(3, axis=(-2, -1), name="a"),
            nn.DenseGeneral(3, axis=(-2, -1), name="a"),
        ),
    ],
)
def test_layers_keep_flax_parameters_and_numbers(ours, theirs):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    variables = theirs.init(jax.random.key(1), x)
    again = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-6
    )


def test_on_cpu_the_gradient_of_a_kernel_transposes_nothing():
    """The reason for `dot_general`: XLA transposed the whole gradient in memory."""
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((4, 16))
    gradient = jax.grad(lambda kernel: jnp.sin(dense.product(x, kernel)).sum())
    program = jax.jit(gradient).lower(kernel).compile().as_text()
    assert "f32[16,128]" not in program
    assert "f32[128,16]" in program
