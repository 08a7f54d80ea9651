# SPDX-License-Identifier: Apache-2.0
"""Dense layers: flax's, with products of matrices where that is faster.

The gradient of a kernel contracts all axes but the last of x and of the output's gradient. XLA on
CPU computes that by transposing the output's gradient, with strides of a whole image: 19 % of a
training step of CoAtNet-0. If both are matrices in the forward pass, it transposes nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.parallel import context

Numbers = tuple[tuple[Any, Any], tuple[Any, Any]]


def dot_general(x: Array, kernel: Array, numbers: Numbers, **options: Any) -> Array:
    """`lax.dot_general`, by matrices on CPU if it contracts the last axis of x, see above."""

    def as_given(x: Array, kernel: Array) -> Array:
        return lax.dot_general(x, kernel, numbers, **options)

    def of_matrices(x: Array, kernel: Array) -> Array:
        y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
        return y.reshape(*x.shape[:-1], *kernel.shape[1:])

    (summed, batch) = numbers
    contracts_last = not any(map(len, batch)) and tuple(map(tuple, summed)) == ((x.ndim - 1,), (0,))
    if not (context.is_fused() and contracts_last):
        return as_given(x, kernel)
    return context.per_platform(x, kernel, cpu=of_matrices, default=as_given)


def product(
    x: Float[Array, "*rows d"], kernel: Float[Array, " d *columns"], **options: Any
) -> Float[Array, "*_"]:
    """Computes ``x @ kernel`` over the last axis of x and the first of kernel."""
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)


def wide_product(x: Float[Array, "*rows d"], table: Float[Array, "v d"]) -> Float[Array, "*rows v"]:
    """Computes the logits ``x @ table.T``, in float32 at least."""

    def multiply(x: Array, table: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=wide)

    def backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        x, table = saved
        g = g.astype(x.dtype)
        return jnp.einsum("...v,vd->...d", g, table), jnp.einsum("...v,...d->vd", g, x)

    if not context.is_fused():
        return multiply(x, table)
    # The gradient of logits in float32 makes products in float32, which cost three times those in
    # bfloat16 on GPU. A TPU rounds their operands by itself.
    narrow = jax.custom_vjp(multiply)
    narrow.defvjp(lambda *args: (multiply(*args), args), backward)
    return context.per_platform(x, table, cuda=narrow, default=multiply)


def head_width(width: int, heads: int) -> int:
    """Returns the width of one head. Raises ValueError if `heads` does not divide `width`."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"width {width} is not divisible by {heads} heads: give a multiple of the heads"
        )
    return width // heads


Dense = partial(nn.Dense, dot_general=dot_general)
DenseGeneral = partial(nn.DenseGeneral, dot_general=dot_general)

Weights = tuple[Float[Array, "_ _"], Float[Array, " _"] | None]  # kernel, bias

# Uniform within +-1 / sqrt(fan_in), torch's default for a linear layer; and +-sqrt(3 / fan_in).
TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0)
WIDE_UNIFORM = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0)


class Projection(nn.Module):
    """The parameters of a dense layer, returned instead of applied.

    Attributes:
      inputs: input width.
      shape: of the output, e.g. (3, heads, width of a head); the kernel is [inputs, *shape].
      use_bias: adds a bias, zero at first.
      kernel_init: called with the kernel's shape as a matrix.
    """

    inputs: int
    shape: tuple[int, ...]
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = TORCH_UNIFORM

    @nn.compact
    def __call__(self) -> Weights:
        """Returns ``(kernel [inputs, prod(shape)], bias [prod(shape)] or None)``."""
        outputs = int(np.prod(self.shape))

        def init(key: Array) -> Array:
            kernel = self.kernel_init(key, (self.inputs, outputs)).astype(jnp.float32)
            return kernel.reshape(self.inputs, *self.shape)

        kernel = self.param("kernel", init).reshape(self.inputs, outputs)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", nn.initializers.zeros, self.shape, jnp.float32)
        return kernel, bias.reshape(outputs)


def project(
    x: Float[Array, "b l d"], weights: Sequence[Weights], *, fused: bool = False, dtype: str
) -> list[Float[Array, "b l _"]]:
    """Computes ``x @ kernel + bias`` for each; `fused`: as one product, split afterwards."""
    if fused and len(weights) > 1:
        widths = [kernel.shape[-1] for kernel, _ in weights]
        kernels = jnp.concatenate([kernel for kernel, _ in weights], -1)
        biases = jnp.concatenate([_bias(w) for w in weights])
        (y,) = project(x, [(kernels, biases)], dtype=dtype)
        return jnp.split(y, np.cumsum(widths)[:-1].tolist(), -1)
    outputs = []
    for kernel, bias in weights:
        y = product(x.astype(dtype), kernel.astype(dtype))
        outputs.append(y if bias is None else y + grids.per_channel(bias.astype(dtype), y))
    return outputs


def project_to_one(
    xs: Sequence[Float[Array, "b l _"]],
    weights: Sequence[Weights],
    *,
    fused: bool = False,
    dtype: str,
) -> list[Float[Array, "b l d"]]:
    """Computes the terms of a sum, ``x @ kernel + bias``; `fused`: their sum, as one product."""
    if fused and len(weights) > 1:
        kernel = jnp.concatenate([kernel for kernel, _ in weights])
        bias = jnp.stack([_bias(w) for w in weights]).sum(0)
        return project(jnp.concatenate(xs, -1), [(kernel, bias)], dtype=dtype)
    return [project(x, [w], dtype=dtype)[0] for x, w in zip(xs, weights, strict=True)]


def _bias(weights: Weights) -> Float[Array, " _"]:
    kernel, bias = weights
    return jnp.zeros_like(kernel[0]) if bias is None else bias
