# SPDX-License-Identifier: Apache-2.0
"""Dense layers side by side: many matrices from one input, or into one sum, as one product or many.

MUSE's branches all read the same x and end in the same sum, so that their input matrices, and their
output matrices, can be one matrix each (arXiv 1911.09483, section 3.4). The parameters stay apart
here, so the choice can be made anew at every call and no checkpoint depends on it.

Legend: b batch, l length, d width.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.dense import product

Weights = tuple[Float[Array, "_ _"], Float[Array, " _"] | None]  # kernel, bias

# torch's default for a linear layer, uniform within +-1 / sqrt(fan_in); and within sqrt(3 / fan_in)
TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0)
WIDE_UNIFORM = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0)


class Projection(nn.Module):
    """The parameters of a dense layer, handed out instead of applied.

    Attributes:
      inputs: input width.
      shape: of the output, e.g. (3, heads, width of a head); the kernel is [inputs, *shape].
      use_bias: adds a bias, zero at first.
      kernel_init: sees the kernel as a matrix.
    """

    inputs: int
    shape: tuple[int, ...]
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = TORCH_UNIFORM

    @nn.compact
    def __call__(self) -> Weights:
        """``(kernel [inputs, prod(shape)], bias [prod(shape)])``."""
        outputs = int(np.prod(self.shape))

        def init(key: Array) -> Array:
            return self.kernel_init(key, (self.inputs, outputs)).reshape(self.inputs, *self.shape)

        kernel = self.param("kernel", init).reshape(self.inputs, outputs)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", nn.initializers.zeros, self.shape)
        return kernel, bias.reshape(outputs)


def project(
    x: Float[Array, "b l d"], weights: Sequence[Weights], *, fused: bool = False, dtype: str
) -> list[Float[Array, "b l _"]]:
    """``x @ kernel + bias`` for each; `fused`: as one product, cut afterwards."""
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
    """Terms of a sum: ``x @ kernel + bias`` for each pair; `fused`: one product, the whole sum."""
    if fused and len(weights) > 1:
        kernel = jnp.concatenate([kernel for kernel, _ in weights])
        bias = jnp.stack([_bias(w) for w in weights]).sum(0)
        return project(jnp.concatenate(xs, -1), [(kernel, bias)], dtype=dtype)
    return [project(x, [w], dtype=dtype)[0] for x, w in zip(xs, weights, strict=True)]


def _bias(weights: Weights) -> Float[Array, " _"]:
    kernel, bias = weights
    return jnp.zeros_like(kernel[0]) if bias is None else bias
