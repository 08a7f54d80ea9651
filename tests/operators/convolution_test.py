# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.operators import convolution
from localglobal_jax.operators.kernels import convolution as kernels


@settings(deadline=None, max_examples=12)
@given(
    space=st.lists(st.integers(3, 8), min_size=1, max_size=2),
    k=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    causal=st.booleans(),
)
def test_shifted_sums_are_the_convolution_forward_and_backward(space, k, stride, causal):
    """The CPU trains with one, the TPU with the other."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *space, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(k,) * len(space) + (3,)), jnp.float32)
    padding = [(k - 1, 0) if causal else (k // 2, k // 2)] * len(space)

    options = {"stride": stride, "padding": padding}

    def run(f):
        def loss(x, w):
            y = f(x, w, **options)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

    ((_, ours), a), ((_, theirs), b) = run(kernels.depthwise), run(convolution.depthwise)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=2e-4), a, b)


@settings(deadline=None, max_examples=12)
@given(
    space=st.lists(st.integers(3, 8), min_size=1, max_size=2),
    k=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([2, 3, 4]),
    causal=st.booleans(),
)
def test_strided_gradients_of_gpus_are_those_of_the_convolution(space, k, stride, causal):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *space, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(k,) * len(space) + (3,)), jnp.float32)
    padding = [(k - 1, 0) if causal else (k // 2, k // 2)] * len(space)

    def plain(x, kernel):
        return convolution.depthwise(x, kernel, stride=stride, padding=padding)

    def run(f):
        loss = jax.value_and_grad(lambda *args: jnp.sin(f(*args)).sum(), (0, 1))
        return jax.jit(loss)(x, kernel)

    a, b = run(kernels.strided(plain, stride, padding)), run(plain)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=2e-4), a, b)


def test_against_the_definition():
    x = jnp.arange(5.0).reshape(1, 5, 1)
    kernel = jnp.array([[1.0], [10.0], [100.0]])
    y = convolution.depthwise(x, kernel)
    np.testing.assert_array_equal(y[0, :, 0], [100, 210, 321, 432, 43])
    y = convolution.depthwise(x, kernel, padding=((2, 0),))  # causal
    np.testing.assert_array_equal(y[0, :, 0], [0, 100, 210, 321, 432])


@pytest.mark.parametrize("window", [1, 3, 5])
def test_local_reach_is_what_the_jacobian_says(window):
    module = convolution.DepthwiseConv(window)
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 2))
    variables = module.init(jax.random.key(1), x)
    jacobian = jax.jacrev(lambda x: module.apply(variables, x)[0, 4, 4].sum())(x)[0].sum(-1)
    moved = np.argwhere(jacobian != 0)
    assert module.reach.name == "LOCAL"
    assert np.abs(moved - 4).max() == module.reach.radius == window // 2
    assert len(moved) == window**2


def test_translation_equivariant_away_from_the_border():
    module = convolution.DepthwiseConv(3)
    x = jax.random.normal(jax.random.key(0), (1, 10, 10, 2))
    variables = module.init(jax.random.key(1), x)
    shifted = module.apply(variables, jnp.roll(x, (2, 3), (1, 2)))
    rolled = jnp.roll(module.apply(variables, x), (2, 3), (1, 2))
    np.testing.assert_allclose(shifted[:, 4:-1, 5:-1], rolled[:, 4:-1, 5:-1], atol=1e-6)


def test_a_window_is_three_positions_wide_unless_told_otherwise():
    assert convolution.DepthwiseConv() == convolution.DepthwiseConv(window=3, stride=1)


def test_kernel_that_does_not_fit():
    with pytest.raises(ValueError, match=r"kernel \(3, 3, 4\)"):
        convolution.depthwise(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 4)))


def test_bf16_stays_bf16():
    module = convolution.DepthwiseConv(3, use_bias=True, dtype="bfloat16")
    y, variables = module.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    assert y.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(1, 80), k=st.integers(1, 40), heads=st.sampled_from([1, 2]), data=st.data()
)
def test_dynamic_kernels_as_bands_of_matrices(length, k, heads, data):
    before = data.draw(st.integers(0, k - 1))
    random = np.random.default_rng(length * k)
    x = jnp.asarray(random.normal(size=(2, length, 4)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(2, length, heads, k)), jnp.float32)

    def run(f):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1)))(x, kernel)

    padding = ((before, k - 1 - before),)
    shifted = run(lambda x, w: convolution.dynamic(x, w, window=(k,), padding=padding))
    banded = run(lambda x, w: kernels.dynamic(x, w, before=before))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), shifted, banded
    )
