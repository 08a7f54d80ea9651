# SPDX-License-Identifier: Apache-2.0
"""O: outlook attention and an MLP, each with its norm and residual."""

from functools import partial

import flax.linen as nn
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks.layers import (
    MLP,
    Activation,
    DropPath,
    Grid,
    Pool,
    Shortcut,
    make_norm,
    pool,
)
from localglobal_jax.operators.outlook import Outlook


class Outlooker(nn.Module):
    """O: ``x + Outlook(Norm(x))``, then ``x + MLP(Norm(x))`` (VOLO, equations 1 and 2).

    With stride 2, which VOLO itself never asks of it, the block is halved as a T block is:
    ``Proj(Pool(x)) + Outlook(Pool(Norm(x)))``.

    Attributes:
      head_width: width of one head; the number of heads follows from it.
      window, spacing: side of a window and distance of two windows, see `Outlook`.
      qkv_bias: of the value projection (outlook attention has neither query nor key).
    """

    features: int
    stride: int = 1
    head_width: PositiveInt = 32
    expansion: PositiveFloat = 3.0
    window: PositiveInt = 3
    spacing: PositiveInt = 2
    pool: Pool = "avg2"
    norm_eps: float = 1e-5
    activation: Activation = "gelu"
    qkv_bias: bool = False
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        norm = partial(make_norm, "layer", eps=self.norm_eps, train=train, dtype=self.dtype)
        shortcut = Shortcut(
            self.features, self.stride, self.pool, dtype=self.dtype, name="shortcut"
        )(x)
        y = norm(name="norm")(x)
        if self.stride == 2:
            y = pool(y, self.pool)
        y = Outlook(
            self.features,
            heads=self.features // self.head_width,
            window=self.window,
            stride=self.spacing,
            value_bias=self.qkv_bias,
            dtype=self.dtype,
            name="outlook",
        )(y, train=train)
        x = shortcut + DropPath(self.drop_path, name="outlook_drop_path")(y, train=train)
        hidden = int(self.expansion * self.features)
        y = MLP(hidden, self.activation, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x + DropPath(self.drop_path, name="mlp_drop_path")(y, train=train)
