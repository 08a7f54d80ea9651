# SPDX-License-Identifier: Apache-2.0
"""M: MUSE's parallel sum as a vision block."""

import flax.linen as nn
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks.layers import (
    DropPath,
    Grid,
    LayerScale,
    Pool,
    Shortcut,
    make_norm,
    pool,
)
from localglobal_jax.operators.muse import Muse


class MuseBlock(nn.Module):
    """M: ``x + Attention(Norm(x)) + Conv(Norm(x)) + FFN(Norm(x))`` (arXiv 1911.09483, pre-norm).

    One norm and one residual for all three branches. Stride 2 as in the other blocks:
    ``Proj(Pool(x)) + Muse(Pool(Norm(x)))``.

    Attributes:
      head_width: width of one head; the number of heads follows from it.
      expansion: hidden width of the pointwise net over the output width.
      windows, dynamic: of the convolution, see `operators.muse.SharedValueConv`.
      layer_scale: initial value of LayerScale on the sum; None: no LayerScale.
    """

    features: int
    stride: int = 1
    head_width: PositiveInt = 32
    expansion: PositiveFloat = 4.0
    windows: tuple[int, ...] = (3, 7)
    dynamic: bool = True
    pool: Pool = "avg2"
    norm_eps: float = 1e-6
    shortcut_bias: bool = True
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        shortcut = Shortcut(
            self.features, self.stride, self.pool, self.shortcut_bias, self.dtype, name="shortcut"
        )(x)
        norm = make_norm("layer", eps=self.norm_eps, train=train, dtype=self.dtype, name="norm")
        y = norm(x)
        if self.stride == 2:
            y = pool(y, self.pool)
        y = Muse(
            self.features,
            max(1, self.features // self.head_width),
            windows=self.windows,
            dynamic=self.dynamic,
            hidden=int(self.expansion * self.features),
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            name="muse",
        )(y, train=train)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name="muse_scale")(y)
        return shortcut + DropPath(self.drop_path, name="muse_drop_path")(y, train=train)
