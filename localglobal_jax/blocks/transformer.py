# SPDX-License-Identifier: Apache-2.0
"""T, S, A, E, F, O and M: an operator and an MLP, with norms and residual connections."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import flax.linen as nn
from pydantic import Field, PositiveFloat, PositiveInt

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
    check_grid,
    make_norm,
    pool,
    pool_rounding,
)
from localglobal_jax.config import renamed
from localglobal_jax.operators import grids
from localglobal_jax.operators.adaptive import AdaptiveConv, EquivariantAttention
from localglobal_jax.operators.attention import RelativeAttention
from localglobal_jax.operators.focal import FocalAttention, PoolMethod, fit_window
from localglobal_jax.operators.focal_nearest import NearestFocalAttention
from localglobal_jax.operators.muse import Muse
from localglobal_jax.operators.outlook import Outlook


def up_or_none(kind: Pool) -> Rounding:
    """Returns "up" for a pool that rounds odd grids up, None for one that would lose a row."""
    return "up" if pool_rounding(kind) == "up" else None


class TransformerBlock(nn.Module):
    """``x + Operator(Norm(x))``, then ``x + MLP(Norm(x))``; the letters below name the operator.

    With stride 2 the main path is normed, then pooled; the shortcut is the un-normed input, pooled
    and projected: ``Proj(Pool(x)) + Operator(Pool(Norm(x)))`` (CoAtNet, A.1).

    Attributes:
      head_width: width of one head; the number of heads follows from it.
      widen_at: "qkv" (paper) or "output" (timm's ``_rw``), where a change of width happens.
      norm: "layer" or "batch".
      layer_scale: initial value of LayerScale on both branches; None: no LayerScale.

    >>> class Mine(lg.blocks.TransformerBlock):
    ...     def operator(self, grid, **options):
    ...         return lg.operators.RelativeAttention(bias="mlp", **options)
    >>> x = jnp.ones((2, 8, 8, 16))
    >>> jax.eval_shape(Mine(32).init_with_output, jax.random.key(0), x)[0].shape
    (2, 8, 8, 32)
    """

    features: int
    stride: int = 1
    head_width: PositiveInt = 32
    expansion: PositiveFloat = 4.0
    widen_at: Literal["qkv", "output"] = "qkv"
    pool: Pool = "avg2"
    norm: Norm = "layer"
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    shortcut_bias: bool = True
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    dtype: str = "float32"

    @property
    def odd_grids(self) -> Rounding:
        """Rounding of a stride of 2 on an odd grid; with positions, no row may be lost."""
        return up_or_none(self.pool)

    @nn.nowrap
    def operator(self, grid: tuple[int, int], **options: Any) -> nn.Module:
        """Returns the operator for a grid; `options`: features, heads, width, dtype and name."""
        raise TypeError(f"{type(self).__name__} has no operator: use a block with a letter")

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        grids.check_input(self, x, "b h w d")
        check_grid(x, self.stride, self.odd_grids)
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
        y = self.operator(
            (y.shape[1], y.shape[2]),
            features=self.features,
            heads=width // self.head_width,
            width=width,
            dtype=self.dtype,
            name="attention",
        )(y, train=train)
        x = shortcut + branch(y, "attention")
        hidden = int(self.expansion * self.features)
        y = MLP(hidden, self.activation, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x + branch(y, "mlp")


class RelativeAttentionBlock(TransformerBlock):
    """T: attention with a bias per displacement (CoAtNet, A.1).

    `bias`, `bias_hidden` and `bias_dropout` are those of `RelativeAttention`.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.RelativeAttentionBlock(32, stride=2, head_width=8)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> variables["params"]["attention"]["relative_bias"]["table"].shape
    (7, 7, 4)
    """

    bias: Literal["table", "mlp", "none"] = "table"
    bias_hidden: PositiveInt = 512
    bias_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.125

    @property
    def odd_grids(self) -> Rounding:
        return pool_rounding(self.pool) if self.bias == "none" else super().odd_grids

    @nn.nowrap
    def operator(self, grid: tuple[int, int], **options: Any) -> nn.Module:
        return RelativeAttention(
            bias=self.bias,
            bias_hidden=self.bias_hidden,
            bias_dropout=self.bias_dropout,
            qkv_bias=self.qkv_bias,
            **options,
        )


class AttentionBlock(RelativeAttentionBlock):
    """S: attention without a bias; equivariant to permutations of the positions.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.AttentionBlock(32, head_width=8)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, sorted(variables["params"]["attention"])
    ((2, 8, 8, 32), ['output', 'qkv'])
    """

    bias: Literal["table", "mlp", "none"] = "none"


class AdaptiveConvBlock(TransformerBlock):
    """A: content-adaptive convolution, with a window of `window` positions a side.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.AdaptiveConvBlock(32, window=3)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 8, 8, 32)
    """

    window: PositiveInt = 7

    @nn.nowrap
    def operator(self, grid: tuple[int, int], **options: Any) -> nn.Module:
        return AdaptiveConv(window=self.window, use_bias=self.qkv_bias, **options)


class EquivariantAttentionBlock(TransformerBlock):
    """E: translation-equivariant attention; its table has the size of one grid.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.EquivariantAttentionBlock(32)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 8, 8, 32)
    """

    @nn.nowrap
    def operator(self, grid: tuple[int, int], **options: Any) -> nn.Module:
        return EquivariantAttention(use_bias=self.qkv_bias, **options)


class FocalAttentionBlock(TransformerBlock):
    """F: focal attention (arXiv 2107.00641, section 3.2).

    Attributes:
      window, expand, levels, focal_window, shift, scale: see `FocalAttention`.
      focal_pool: how windows are pooled, its `pool`.
      nearest: keys per level of `NearestFocalAttention`; 0: neighbours by rolls.
      grid: the grid that windows are chosen for: one that fills it shrinks to it and has no
        neighbours. None: the grid of the input; then parameters serve this grid size alone.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.FocalAttentionBlock(32, window=4, expand=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 8, 8, 32)
    """

    norm_eps: float = 1e-5
    window: PositiveInt = 7
    expand: int = 3
    levels: PositiveInt = 2
    focal_window: PositiveInt = 3
    shift: int = 0
    focal_pool: PoolMethod = "fc"
    scale: float | None = None
    nearest: int = 0
    grid: tuple[int, int] | None = None

    @nn.nowrap
    def operator(self, grid: tuple[int, int], **options: Any) -> nn.Module:
        window, expand, shift = fit_window(self.grid or grid, self.window, self.expand, self.shift)
        options |= {
            "window": window,
            "levels": self.levels,
            "pool": self.focal_pool,
            "qkv_bias": self.qkv_bias,
            "scale": self.scale,
        }
        if self.nearest:
            return NearestFocalAttention(count=self.nearest, grid=self.grid, **options)
        return FocalAttention(expand=expand, shift=shift, focal_window=self.focal_window, **options)


def heads_of(features: int, head_width: int) -> int:
    """Returns ``features // head_width``, at least 1. Raises ValueError if these do not divide."""
    heads = max(1, features // head_width)
    if features % heads:
        raise ValueError(
            f"head_width={head_width} makes {heads} heads of a width of {features}, which they do "
            f"not divide: give another width, such as {head_width * heads}, or another head_width"
        )
    return heads


class OutlookerBlock(nn.Module):
    """O: ``x + Outlook(Norm(x))``, then ``x + MLP(Norm(x))`` (VOLO, equations 1 and 2).

    With stride 2, which VOLO does not use, the grid is halved as in a T block:
    ``Proj(Pool(x)) + Outlook(Pool(Norm(x)))``.

    Attributes:
      head_width: least width of one head: there are ``features // head_width`` heads, at least one.
      window, spacing: side of a window and distance of two windows, see `Outlook`.
      qkv_bias: of the value projection (outlook attention has neither query nor key).

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.OutlookerBlock(32, stride=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, sorted(variables["params"]["outlook"])
    ((2, 4, 4, 32), ['output', 'value', 'weights'])
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

    @property
    def odd_grids(self) -> Rounding:
        """Rounding of a stride of 2 on an odd grid; no row may be lost."""
        return up_or_none(self.pool)

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        grids.check_input(self, x, "b h w d")
        check_grid(x, self.stride, self.odd_grids)
        heads = heads_of(self.features, self.head_width)
        norm = partial(make_norm, "layer", eps=self.norm_eps, train=train, dtype=self.dtype)
        shortcut = Shortcut(
            self.features, self.stride, self.pool, dtype=self.dtype, name="shortcut"
        )(x)
        y = norm(name="norm")(x)
        if self.stride == 2:
            y = pool(y, self.pool)
        y = Outlook(
            self.features,
            heads=heads,
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


class MuseBlock(nn.Module):
    """M: ``x + Attention(Norm(x)) + Conv(Norm(x)) + FFN(Norm(x))`` (arXiv 1911.09483, pre-norm).

    One norm and one residual for all three branches. Stride 2 as in the other blocks:
    ``Proj(Pool(x)) + Muse(Pool(Norm(x)))``.

    Attributes:
      head_width: least width of one head: there are ``features // head_width`` heads, at least one.
      expansion: hidden width of the pointwise net over the output width.
      windows, dynamic: of the convolution, see `operators.muse.SharedValueConv`.
      layer_scale: initial value of LayerScale on the sum; None: no LayerScale.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.MuseBlock(32, windows=(3,))
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 8, 8, 32)
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

    @property
    def odd_grids(self) -> Rounding:
        """Rounding of a stride of 2 on an odd grid; no row may be lost."""
        return up_or_none(self.pool)

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        grids.check_input(self, x, "b h w d")
        check_grid(x, self.stride, self.odd_grids)
        heads = heads_of(self.features, self.head_width)
        shortcut = Shortcut(
            self.features, self.stride, self.pool, self.shortcut_bias, self.dtype, name="shortcut"
        )(x)
        norm = make_norm("layer", eps=self.norm_eps, train=train, dtype=self.dtype, name="norm")
        y = norm(x)
        if self.stride == 2:
            y = pool(y, self.pool)
        y = Muse(
            self.features,
            heads,
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


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
