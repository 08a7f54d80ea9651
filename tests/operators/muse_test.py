# SPDX-License-Identifier: Apache-2.0
"""The parallel sum: shared values, kernels that sum to one, a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.operators.convolution import SharedValueConv, depthwise, dynamic
from localglobal_jax.operators.muse import Muse

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("space", "window", "padding"), [((5, 4), (3, 3), None), ((9,), (4,), ((3, 0),))]
)
def test_dynamic_with_one_kernel_everywhere_is_depthwise(space, window, padding):
    x, kernel = normal(2, *space, 6), normal(3, int(np.prod(window)))
    same = jnp.broadcast_to(kernel, (2, *space, *kernel.shape))
    y = dynamic(x, same, window=window, padding=padding)
    per_channel = jnp.repeat(kernel, 2, 0).T.reshape(*window, 6)  # a head is a run of channels
    expected = depthwise(x, per_channel, padding=padding)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_dynamic_refuses_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 5, 4, 3\).*\(1, 5, 6\)"):
        dynamic(normal(1, 5, 6), normal(1, 5, 4, 3), window=(3,))


def test_dynamic_kernels_sum_to_one_inside():
    """On constant values a softmax kernel gives the value back, away from the zeros outside."""
    module = SharedValueConv(heads=2, windows=(3, 5))
    value = jnp.broadcast_to(normal(4), (1, 9, 9, 4))
    variables = module.init(jax.random.key(0), value)
    y = module.apply(variables, value)
    np.testing.assert_allclose(y[:, 2:-2, 2:-2], value[:, 2:-2, 2:-2], atol=1e-6)
    assert float(jnp.abs(y - value)[:, 0].max()) > 1e-3
    np.testing.assert_allclose(variables["params"]["gate"], 0.5)


@pytest.mark.parametrize("dynamic_kernels", [True, False])
def test_convolution_reads_the_value_projection(dynamic_kernels):
    """Without values there is neither attention nor convolution: only the pointwise net is left."""
    module = Muse(8, heads=2, windows=(3, 5), dynamic=dynamic_kernels, hidden=16)
    x = normal(1, 6, 6, 8)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["output"]["kernel"].shape == (16, 8)  # attention and convolution side by side
    qkv = params["qkv"]["kernel"]
    silent = {**params, "qkv": {**params["qkv"], "kernel": qkv.at[:, 2].set(0.0)}}
    pointwise = jax.nn.gelu(x @ params["hidden"]["kernel"], approximate=False)
    np.testing.assert_allclose(
        module.apply({"params": silent}, x), pointwise @ params["pointwise"]["kernel"], atol=1e-5
    )


def test_without_windows_it_is_muse_simple():
    module = Muse(8, heads=2, windows=(), hidden=0)
    params = module.init(jax.random.key(0), normal(1, 4, 4, 8))["params"]
    assert set(params) == {"qkv", "relative_bias", "output"}
    assert params["output"]["kernel"].shape == (8, 8)


def test_even_windows_have_no_centre():
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        Muse(8, heads=2, windows=(3, 4)).init(jax.random.key(0), normal(1, 4, 4, 8))
