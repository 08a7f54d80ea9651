# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds by hand against multiply-adds by trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from localglobal_jax.models import flops
from localglobal_jax.models.registry import create_model
from localglobal_jax.operators import attention
from localglobal_jax.operators.convolution import depthwise

X = jnp.zeros((2, 8, 6, 4))


def count(function, *shapes):
    return flops.multiply_adds(function, *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))


def test_matrix_products():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 3 * 5 * 7
    assert count(lambda q, k: jnp.einsum("blnc,bmnc->bnlm", q, k), (2, 5, 3, 4), (2, 6, 3, 4)) == (
        2 * 3 * 5 * 6 * 4
    )
    assert count(jnp.dot, (5,), (5,)) == 5


def test_convolutions():
    def conv(groups, stride):
        module = nn.Conv(8, (3, 3), stride, padding=1, feature_group_count=groups)
        return flops.model_cost(module_of(module), X).multiply_adds

    assert conv(1, 1) == 2 * 8 * 6 * 8 * 9 * 4
    assert conv(1, 2) == 2 * 4 * 3 * 8 * 9 * 4
    assert conv(4, 1) == 2 * 8 * 6 * 8 * 9


def module_of(layer):
    """A module that takes `train`, as ours do."""

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return layer.clone(parent=self)(x)

    return Wrapped()


def test_a_depthwise_convolution_counts_the_same_in_every_form():
    kernel = (3, 3, 4)
    assert count(depthwise, X.shape, kernel) == X.size * 9
    assert count(lambda x, k: depthwise(x, k, stride=2), X.shape, kernel) == X.size // 4 * 9


def test_loops_count_their_trips():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert count(scanned, (3, 4), (4, 4)) == 5 * 3 * 4 * 4
    inner = jax.checkpoint(jax.jit(scanned))
    assert count(inner, (3, 4), (4, 4)) == 5 * 3 * 4 * 4

    def endless(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="while"):
        count(endless, (3, 4), (4, 4))
    assert count(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), ()) == 0


def test_a_batch_counts_every_image():
    module = create_model("coatnet_0", depths=(1, 1, 1, 1))
    one, two = (
        flops.model_cost(module, jax.ShapeDtypeStruct((n, 64, 32, 3), "float32")) for n in (1, 2)
    )
    assert two.multiply_adds == 2 * one.multiply_adds
    assert two.parameters == one.parameters


def test_what_is_made_twice_to_move_fewer_bytes_counts_once():
    """The forms for TPU make the logits of attention twice; work is that of the equations."""
    x = jax.ShapeDtypeStruct((1, 6, 2, 4), "float32")
    product = 6 * 2 * 6 * 4
    assert flops.multiply_adds(attention.attend, x, x, x) == 2 * product

    def loss(query, key, value):
        return attention.attend(query, key, value).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    assert flops.multiply_adds(gradient, x, x, x) == 6 * product
