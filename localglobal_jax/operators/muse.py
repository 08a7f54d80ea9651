# SPDX-License-Identifier: Apache-2.0
"""MUSE: attention, convolution and a pointwise net side by side, summed (arXiv 1911.09483).

``Attention(x) + Conv(x) + FFN(x)``, all reading the same x. What makes it more than three branches:
the convolution reads attention's value projection, and both leave through one output projection.

Legend: b batch, d width, n heads, c width of a head, k positions of a kernel's window.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from localglobal_jax import arrays
from localglobal_jax.operators.attention import RelativeBiasTable, attend
from localglobal_jax.operators.convolution import Padding, depthwise, dynamic, same_padding
from localglobal_jax.reach import GLOBAL, Reach

# ---------------------------------------------------------------------------- functions


def mix(
    parts: Sequence[Float[Array, "b *space d"]], gate: Float[Array, " parts"]
) -> Float[Array, "b *space d"]:
    """The parts weighed by the softmax of one learned number each (section 3.3)."""
    weights = jax.nn.softmax(gate)
    total = jnp.zeros_like(parts[0])
    for i, part in enumerate(parts):
        total = total + part * weights[i].astype(part.dtype)
    return total


# ---------------------------------------------------------------------------- modules


class SharedValueConv(nn.Module):
    """Depthwise convolutions of attention's value projection, one per window, mixed by a gate.

    Attributes:
      heads: heads share a kernel when it is dynamic.
      windows: side of every kernel.
      dynamic: kernels are the softmax over the window of a linear function of the value at the
        position (arXiv 1901.10430); else learned and static.
      padding: per space dimension, (before, after), for each window; None: centred.
      dtype: of the computation; parameters are float32.
    """

    heads: int
    windows: tuple[int, ...] = (3, 7)
    dynamic: bool = True
    padding: tuple[Padding, ...] | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, value: Float[Array, "b *space d"]) -> Float[Array, "b *space d"]:
        if self.padding is None and any(side % 2 == 0 for side in self.windows):
            raise ValueError(f"muse: windows {self.windows} must be odd to be centred")
        parts, rank = [], value.ndim - 2
        wide = jnp.promote_types(self.dtype, jnp.float32)
        for i, side in enumerate(self.windows):
            window = (side,) * rank
            padding = same_padding(window) if self.padding is None else self.padding[i]
            if self.dynamic:
                logits = nn.DenseGeneral(
                    (self.heads, side**rank), use_bias=False, dtype=self.dtype, name=f"kernel{side}"
                )(value)
                # Over the whole window: what falls outside the grid keeps its share, as in MUSE.
                kernel = jax.nn.softmax(logits.astype(wide), -1).astype(value.dtype)
                parts.append(dynamic(value, kernel, window=window, padding=padding))
            else:
                shape = (*window, value.shape[-1])
                normal = nn.initializers.normal(side ** (-0.5 * rank))
                kernel = self.param(f"kernel{side}", normal, shape).astype(self.dtype)
                parts.append(depthwise(value, kernel, padding=padding))
        if len(parts) == 1:
            return parts[0]
        equal = nn.initializers.constant(1 / len(parts))
        return mix(parts, self.param("gate", equal, (len(parts),)))


class Muse(nn.Module):
    """The parallel sum over a grid [b, h, w, d]; attention has a bias per displacement.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of attention; None: `features`.
      windows, dynamic: of the convolution, see `SharedValueConv`; no windows: MUSE-simple.
      hidden: of the pointwise net; 0: none.
      dtype: of the computation; parameters are float32.
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    windows: tuple[int, ...] = (3, 7)
    dynamic: bool = True
    hidden: int = 0
    use_bias: bool = True
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        b, h, w, d = x.shape
        features = self.features or d
        width = self.width or features
        if width % self.heads:
            raise ValueError(f"muse: width {width} is not divisible by {self.heads} heads")
        xavier = nn.initializers.xavier_uniform()
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=xavier)
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=xavier,
            name="qkv",
        )(arrays.grid_to_sequence(x))
        query, key, value = jnp.moveaxis(qkv, -3, 0)
        bias = RelativeBiasTable(self.heads, name="relative_bias")(h, w)
        branches = [attend(query, key, value, bias=bias).reshape(b, h, w, width)]
        if self.windows:
            conv = SharedValueConv(
                self.heads, self.windows, self.dynamic, dtype=self.dtype, name="convolution"
            )
            branches.append(conv(value.reshape(b, h, w, width)))
        y = dense(features, use_bias=self.use_bias, name="output")(jnp.concatenate(branches, -1))
        if self.hidden:
            pointwise = nn.gelu(dense(self.hidden, name="hidden")(x), approximate=False)
            y = y + dense(features, name="pointwise")(pointwise)
        return y
