# SPDX-License-Identifier: Apache-2.0
"""Activation functions, by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from localglobal_jax.parallel import context

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh", "none"]


def gelu(x: Array) -> Array:
    """Computes ``x (1 + erf(x / sqrt 2)) / 2``, not its tanh approximation (arXiv 1606.08415).

    >>> lg.operators.gelu(jnp.array([-100.0, 0.0, 100.0])).tolist()
    [-0.0, 0.0, 100.0]
    """
    if not context.is_fused():
        return nn.gelu(x, approximate=False)  # by erfc, at about twice the cost of erf
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def relu(x: Array) -> Array:
    """Computes ``max(x, 0)``."""
    if not context.is_fused():
        return nn.relu(x)
    return context.per_platform(x, cuda=_relu, default=nn.relu)


@jax.custom_vjp
def _relu(x: Array) -> Array:
    """Stores its output. A product of cuBLAS applies the ReLU itself, and its input stays there."""
    return nn.relu(x)


def _relu_backward(y: Array, g: Array) -> tuple[Array]:
    y = lax.optimization_barrier(y)  # XLA would compare the input instead
    return (jnp.where(y > 0, g, jnp.zeros_like(g)),)


_relu.defvjp(lambda x: (nn.relu(x),) * 2, _relu_backward)

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "relu": relu,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}
