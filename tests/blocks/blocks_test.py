# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.blocks import BLOCKS, SEQUENCE_BLOCKS, layers
from localglobal_jax.parallel import context


@pytest.mark.parametrize("letter", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("features", [8, 16])
def test_every_block_strides_widens_and_trains(letter, stride, features):
    fields = {field.name for field in dataclasses.fields(BLOCKS[letter])}
    kwargs = {"head_width": 4} if "head_width" in fields else {}
    block = BLOCKS[letter](features=features, stride=stride, drop_path=0.5, **kwargs)
    x = jax.random.normal(jax.random.key(0), (4, 4, 6, 8))
    y, variables = jax.jit(lambda key: block.init_with_output(key, x))(jax.random.key(1))
    assert y.shape == (4, 4 // stride, 6 // stride, features)

    def loss(params):
        y, _ = block.apply(
            {**variables, "params": params},
            x,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=["batch_stats"],
        )
        return jnp.sum(y**2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(g)
    ]
    # The norm after the expansion takes away what this one adds: the gradient is zero, or noise.
    assert not set(dead) - ({"['norm']['bias']"} if letter == "C" else set())


@pytest.mark.parametrize("kind", ["avg2", "max2", "avg", "max"])
def test_pool_halves_and_averages_only_the_inside(kind):
    ones = jnp.ones((1, 6, 4, 2))
    np.testing.assert_array_equal(layers.pool(ones, kind), jnp.ones((1, 3, 2, 2)))


@pytest.mark.parametrize(
    ("value", "expected"), [(8, 8), (9, 16), (23, 24), (3, 8), (64, 64), (90, 88)]
)
def test_make_divisible(value, expected):
    assert layers.make_divisible(value) == expected


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    drop = layers.DropPath(0.25)
    y = drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    per_example = np.asarray(y.reshape(4000, -1))
    assert set(np.unique(per_example)) <= {0.0, np.float32(1 / 0.75)}
    assert np.all(per_example == per_example[:, :1])
    assert abs(per_example.mean() - 1) < 0.05
    np.testing.assert_array_equal(drop.apply({}, x, train=False), x)


def test_batch_norm_keeps_momentum_090_and_the_biased_variance():
    norm = layers.make_norm("batch", eps=1e-5, train=True, dtype="float32", name="norm")
    x = jax.random.normal(jax.random.key(0), (8, 3, 3, 2)) * 2 + 1
    variables = norm.init(jax.random.key(1), x)
    _, after = norm.apply(variables, x, mutable=["batch_stats"])
    stats = after["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("letter", BLOCKS)
def test_a_stride_that_a_block_does_not_have_is_refused(letter):
    block = BLOCKS[letter]
    for stride, shape, message in ((4, (1, 8, 8, 32), "stride=4"), (2, (1, 1, 8, 32), "1 x 8")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(block(32, stride=stride).init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize("letter", BLOCKS)
def test_an_odd_grid_is_halved_or_refused_by_its_size(letter):
    block, x = BLOCKS[letter](32, stride=2), jnp.ones((1, 7, 8, 32))
    if letter == "S":  # which has no positions
        y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
        assert y.shape == (1, 3, 4, 32)
    else:
        with pytest.raises(ValueError, match="grid of 7 x 8"):
            jax.eval_shape(block.init, jax.random.key(0), x)


@pytest.mark.parametrize("letter", "AEFMOST")
def test_an_odd_grid_is_halved_by_pools_that_round_up(letter):
    block, x = BLOCKS[letter](32, stride=2, pool="max"), jnp.ones((1, 7, 8, 32))
    y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    assert y.shape == (1, 4, 4, 32)


@pytest.mark.parametrize("letter", ["M", "O"])
def test_heads_that_do_not_divide_the_width_are_named_by_their_width(letter):
    with pytest.raises(ValueError, match="head_width=32"):
        jax.eval_shape(BLOCKS[letter](100).init, jax.random.key(0), jnp.ones((1, 4, 4, 100)))


@pytest.mark.parametrize("letter", BLOCKS)
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_variables_are_float32_under_x64(letter, implementation):
    with jax.enable_x64(True), context.implementation(implementation):
        x = jnp.ones((1, 8, 8, 16), jnp.float32)
        found = jax.eval_shape(BLOCKS[letter](32).init, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


@pytest.mark.parametrize("letter", SEQUENCE_BLOCKS)
def test_variables_of_sequences_are_float32_under_x64(letter):
    with jax.enable_x64(True):
        x = jnp.ones((1, 6, 16), jnp.float32)
        layer = SEQUENCE_BLOCKS[letter](16, heads=2, hidden=32)
        found = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


@pytest.mark.parametrize("letter", SEQUENCE_BLOCKS)
def test_a_memory_that_a_layer_would_not_read_is_refused(letter):
    layer, x = SEQUENCE_BLOCKS[letter](16, heads=2, hidden=32), jnp.ones((1, 6, 16))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    for call in (
        lambda v: layer.apply(v, x, memory={"key": x}),
        lambda v: layer.apply(v, x, jnp.ones((1, 6), bool), method="precompute_kv"),
    ):
        with pytest.raises(ValueError, match="memory_features"):
            jax.eval_shape(call, variables)


@pytest.mark.parametrize("rate", [0, 0.0])
def test_a_drop_path_of_rate_zero_needs_no_random_key(rate):
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(layers.DropPath(rate).apply({}, x, train=True), x)


@pytest.mark.parametrize("letter", ["M", "O"])
def test_a_block_narrower_than_a_head_has_one_head(letter):
    y, _ = jax.eval_shape(
        BLOCKS[letter](16).init_with_output, jax.random.key(0), jnp.ones((1, 4, 4, 16))
    )
    assert y.shape == (1, 4, 4, 16)
