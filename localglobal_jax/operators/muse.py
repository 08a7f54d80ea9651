# SPDX-License-Identifier: Apache-2.0
"""MUSE: attention, convolution and a pointwise net side by side, summed (arXiv 1911.09483).

``Attention(x) + Conv(x) + FFN(x)``, all reading the same x. What makes it more than three branches:
the convolution reads attention's value projection, and both leave through one output projection.

Legend: b batch, d width, n heads, c width of a head, k positions of a kernel's window.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.activations import ACTIVATIONS
from localglobal_jax.operators.attention import RelativeBiasTable, attend, project_heads, show
from localglobal_jax.operators.convolution import depthwise, dynamic, same_padding
from localglobal_jax.operators.dense import Dense, DenseGeneral
from localglobal_jax.operators.projection import TORCH_UNIFORM
from localglobal_jax.operators.reach import GLOBAL, Reach, local

Kind = Literal["dynamic", "depthwise", "standard"]

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
    """Convolutions of attention's value projection, one per window, mixed by a gate (section 3.3).

    Attributes:
      heads: heads share a kernel when it is dynamic.
      windows: side of every kernel.
      kind: "dynamic": kernels are the softmax over the window of a linear function of the value at
        the position (arXiv 1901.10430); "depthwise": learned, static; "standard": mixes channels.
      gate: mixes several windows; without it they stand side by side and widen the output.
      causal: windows end at the position itself (sequences); else they are centred.
      dropout: of the weights of dynamic kernels.
      dtype: of the computation; parameters are float32.
    """

    heads: int
    windows: tuple[int, ...] = (3, 7)
    kind: Kind = "dynamic"
    gate: bool = True
    causal: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        widest = max(self.windows)
        return local(widest - 1 if self.causal else widest // 2)

    @nn.compact
    def __call__(
        self, value: Float[Array, "b *space d"], *, last: bool = False, train: bool = False
    ) -> Float[Array, "b *out e"]:
        """`last`: of a causal sequence, only the output at its last position, [b, 1, e].

        Then `value` need hold no more than the widest window, with zeros before the beginning.
        """
        if not self.causal and any(side % 2 == 0 for side in self.windows):
            raise ValueError(f"muse: windows {self.windows} must be odd to be centred")
        if len(set(self.windows)) < len(self.windows):
            raise ValueError(f"muse: windows {self.windows} must differ")
        parts = [self._convolve(value, side, last, train) for side in self.windows]
        if len(parts) == 1 or not self.gate:
            return jnp.concatenate(parts, -1)
        equal = nn.initializers.constant(1 / len(parts))
        return mix(parts, self.param("gate", equal, (len(parts),)))

    def _convolve(self, value: Array, side: int, last: bool, train: bool) -> Array:
        rank, width = value.ndim - 2, value.shape[-1]
        window, name = (side,) * rank, f"kernel{side}"
        padding = ((side - 1, 0),) if self.causal else same_padding(window)
        here = value
        if last:
            here, value, padding = value[:, -1:], value[:, -side:], ((0, 0),)
        if self.kind == "standard":
            convolution = nn.Conv(
                width, window, padding=padding, use_bias=False, dtype=self.dtype, name=name
            )
            return convolution(value)
        if self.kind == "depthwise":
            normal = nn.initializers.normal(side ** (-0.5 * rank))
            kernel = self.param(name, normal, (*window, width)).astype(self.dtype)
            return depthwise(value, kernel, padding=padding)
        logits = DenseGeneral(
            (self.heads, side**rank),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=TORCH_UNIFORM,
            name=name,
        )(here)
        # Over the whole window: what falls outside keeps its share, as in the published code.
        kernel = jax.nn.softmax(logits.astype(jnp.promote_types(self.dtype, jnp.float32)), -1)
        kernel = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{side}")(kernel)
        kernel = kernel.astype(value.dtype)
        if not last:
            return dynamic(value, kernel, window=window, padding=padding)
        heads = value.reshape(*value.shape[:-1], self.heads, -1)
        # A sum, no product of matrices: for that XLA on CPU transposes what the window sees.
        return (kernel.swapaxes(1, 3) * heads).sum(1).reshape(here.shape)


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
        sequence = grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.use_bias, self.dtype)
        bias = RelativeBiasTable(self.heads, name="relative_bias")(h, w)
        show(self, query, key, bias)
        branches = [attend(query, key, value, bias=bias).reshape(b, h, w, width)]
        if self.windows:
            kind: Kind = "dynamic" if self.dynamic else "depthwise"
            conv = SharedValueConv(
                self.heads, self.windows, kind, dtype=self.dtype, name="convolution"
            )
            branches.append(conv(value.reshape(b, h, w, width)))
        xavier = nn.initializers.xavier_uniform()
        dense = partial(Dense, dtype=self.dtype, kernel_init=xavier)
        y = dense(features, use_bias=self.use_bias, name="output")(jnp.concatenate(branches, -1))
        if self.hidden:
            pointwise = ACTIVATIONS["gelu"](dense(self.hidden, name="hidden")(x))
            y = y + dense(features, name="pointwise")(pointwise)
        return y
