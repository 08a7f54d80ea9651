# SPDX-License-Identifier: Apache-2.0
"""N: ConvNeXt's block, as timm's ``coatnext`` uses it: LOCAL, with one norm."""

from typing import Literal

import flax.linen as nn
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks.layers import (
    MLP,
    Activation,
    DropPath,
    Grid,
    LayerScale,
    Norm,
    Pool,
    Rounding,
    Shortcut,
    make_norm,
    pool,
    pool_rounding,
)
from localglobal_jax.operators.convolution import DepthwiseConv


class ConvNeXt(nn.Module):
    """N: ``x + MLP(Norm(DepthConv(x)))`` (arXiv 2201.03545, figure 4), nothing before the operator.

    The depthwise convolution may widen: its input is then repeated, output channel c reads input
    channel c // (features / width of x).

    Attributes:
      stride_at: where the main path strides: in the "depthwise" convolution or before it ("pool").
      main_pool: how the main path is halved, if it pools; the shortcut averages 2 x 2.
      layer_scale: initial value of LayerScale; None: no LayerScale.
    """

    features: int
    stride: int = 1
    expansion: PositiveFloat = 4.0
    window: PositiveInt = 7
    stride_at: Literal["depthwise", "pool"] = "depthwise"
    main_pool: Pool = "avg2"
    activation: Activation = "gelu"
    norm: Norm = "layer"
    norm_eps: float = 1e-6
    layer_scale: float | None = 1e-6
    drop_path: float = 0.0
    dtype: str = "float32"

    @property
    def odd_grids(self) -> Rounding:
        """How a stride of 2 halves an odd grid: both paths must round alike."""
        both_down = self.stride_at == "pool" and pool_rounding(self.main_pool) == "down"
        return "down" if both_down else None

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        repeats, rest = divmod(self.features, x.shape[-1])
        if rest:
            raise ValueError(
                f"ConvNeXt block: width {self.features} is not a multiple of its input's width "
                f"{x.shape[-1]}; its depthwise convolution can only repeat channels"
            )
        shortcut = Shortcut(self.features, self.stride, dtype=self.dtype, name="shortcut")(x)
        y, stride = x, self.stride
        if stride == 2 and self.stride_at == "pool":
            y, stride = pool(y, self.main_pool), 1
        y = DepthwiseConv(self.window, stride, use_bias=True, dtype=self.dtype, name="depthwise")(
            y.repeat(repeats, axis=-1)
        )
        y = make_norm(self.norm, eps=self.norm_eps, train=train, dtype=self.dtype, name="norm")(y)
        hidden = int(self.expansion * self.features)
        y = MLP(hidden, self.activation, self.dtype, name="mlp")(y)
        if self.layer_scale:
            y = LayerScale(self.layer_scale, name="scale")(y)
        return shortcut + DropPath(self.drop_path, name="drop_path")(y, train=train)
