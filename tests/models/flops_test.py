# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds by hand against multiply-adds by trace."""

import math
import re

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


PAIRS = {"widths": (8, 8), "heads": (2, 2), "depths": (2, 1)}
FAMILIES = {
    "coatnet": {"layout": "CT", "stem": (8, 8), "widths": (8, 32), "depths": (2, 1)},
    "volo": {"layout": "OS", "strides": (1, 2), "stem": 8, "position": 2, "class_blocks": 1}
    | PAIRS,
    "focal": {
        "layout": "FF", "window": 4, "expand": (2, 1), "levels": (2, 2), "focal_windows": (3, 1),
        "image_size": 32,
    } | PAIRS,
    "muse": {"source_vocab": 9, "target_vocab": 9, "layout": "MM", "hidden": (8, 8)} | PAIRS,
}  # fmt: skip


def inputs(name, rows):
    """Shapes of a batch of `rows`."""
    if name == "muse":
        return [jax.ShapeDtypeStruct((rows, length), "int32") for length in (6, 5)]
    return [jax.ShapeDtypeStruct((rows, 32, 32, 3), "float32")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_counts_every_example(name):
    module = create_model(name, **FAMILIES[name])
    traced = {}
    one, again, two = (
        flops.model_cost(module, *inputs(name, rows), traced=traced) for rows in (1, 1, 2)
    )
    assert again == one
    assert two.multiply_adds == 2 * one.multiply_adds
    assert two.parameters == one.parameters


def size(tensor):
    """``"4x8xf32"`` -> ``[4, 8]``."""
    return [int(n) for n in tensor.split("x")[:-1]]


def products(text):
    """Counts the multiply-adds in the text of a StableHLO program without loops."""
    bodies = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)\n  }", text, re.DOTALL))

    def count(name):
        total = 0
        for line in bodies[name].splitlines():
            shapes = [size(tensor) for tensor in re.findall(r"tensor<([^>]*)>", line)]
            if "stablehlo.dot_general" in line:
                axes = re.search(r"contracting_dims = \[([\d, ]*)\]", line)[1].split(", ")
                total += math.prod([*shapes[-1], *(shapes[-3][int(axis)] for axis in axes)])
            elif "stablehlo.convolution" in line:
                kernel = re.search(r"\]x\[([^\]]*)\]", line)[1].split(", ")
                inner = [n for n, axis in zip(shapes[-2], kernel, strict=True) if axis != "o"]
                total += math.prod([*shapes[-1], *inner])
            elif called := re.search(r" call @(\w+)", line):
                total += count(called[1])
        return total

    return count("main")


@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_a_model_are_those_of_its_program(name):
    """Counted in another way: in the text of the program that is lowered for TPU."""
    module, batch = create_model(name, **FAMILIES[name]), inputs(name, 2)
    cost = flops.model_cost(module, *batch)
    traced = jax.jit(module.apply).trace(cost.shapes, *batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" not in text
    assert cost.multiply_adds == products(text)


def test_what_is_made_twice_to_move_fewer_bytes_counts_once():
    """The forms for TPU make the logits of attention twice; work is that of the equations."""
    x = jax.ShapeDtypeStruct((1, 6, 2, 4), "float32")
    product = 6 * 2 * 6 * 4
    assert flops.multiply_adds(attention.attend, x, x, x) == 2 * product

    def loss(query, key, value):
        return attention.attend(query, key, value).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    assert flops.multiply_adds(gradient, x, x, x) == 6 * product
