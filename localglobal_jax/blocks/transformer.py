# SPDX-License-Identifier: Apache-2.0
"""T and S: self-attention and an MLP, each with its norm and residual."""

from functools import partial
from typing import Literal

import flax.linen as nn

from localglobal_jax.blocks.residual import (
    MLP,
    DropPath,
    Grid,
    LayerScale,
    Pool,
    Rounding,
    Shortcut,
    make_norm,
    pool,
    pool_rounding,
)
from localglobal_jax.operators.attention import RelativeAttention


class Transformer(nn.Module):
    """T: ``x + Attention(Norm(x))``, then ``x + MLP(Norm(x))``, with relative bias (CoAtNet, A.1).

    With stride 2 the main path is normed, then pooled; the shortcut is the un-normed input, pooled
    and projected: ``Proj(Pool(x)) + Attention(Pool(Norm(x)))``.

    Attributes:
      head_width: width of one head; the number of heads follows from it.
      widen_at: "qkv" (paper) or "output" (timm's ``_rw``), where a change of width happens.
      bias: of the attention, see `RelativeAttention`.
      norm: "layer" or "batch".
      layer_scale: initial value of LayerScale on both branches; None: no LayerScale.
    """

    features: int
    stride: int = 1
    head_width: int = 32
    expansion: float = 4.0
    widen_at: Literal["qkv", "output"] = "qkv"
    bias: Literal["table", "mlp", "none"] = "table"
    bias_hidden: int = 512
    pool: Pool = "avg2"
    norm: Literal["layer", "batch"] = "layer"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    shortcut_bias: bool = True
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    dtype: str = "float32"

    @property
    def odd_grids(self) -> Rounding:
        """How a stride of 2 halves an odd grid; with positions, it may not lose a row of them."""
        rounding = pool_rounding(self.pool)
        return rounding if rounding == "up" or self.bias == "none" else None

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        norm = partial(make_norm, self.norm, eps=self.norm_eps, train=train, dtype=self.dtype)
        width = self.features if self.widen_at == "qkv" else x.shape[-1]
        if width % self.head_width:
            raise ValueError(
                f"attention width {width} is not divisible by head_width={self.head_width}: "
                "choose widths that are multiples of it"
            )

        def branch(y: Grid, name: str) -> Grid:
            if self.layer_scale is not None:
                y = LayerScale(self.layer_scale, name=f"{name}_scale")(y)
            return DropPath(self.drop_path, name=f"{name}_drop_path")(y, train=train)

        shortcut = Shortcut(
            self.features, self.stride, self.pool, self.shortcut_bias, self.dtype, name="shortcut"
        )(x)
        y = norm(name="norm")(x)
        if self.stride == 2:
            y = pool(y, self.pool)
        y = RelativeAttention(
            self.features,
            heads=width // self.head_width,
            width=width,
            bias=self.bias,
            bias_hidden=self.bias_hidden,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
            name="attention",
        )(y, train=train)
        x = shortcut + branch(y, "attention")
        hidden = int(self.expansion * self.features)
        y = MLP(hidden, self.activation, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x + branch(y, "mlp")


class PlainTransformer(Transformer):
    """S: the same without a bias: attention that does not know where things are."""

    bias: Literal["table", "mlp", "none"] = "none"
