# SPDX-License-Identifier: Apache-2.0
"""C and N: blocks around a depthwise convolution; LOCAL, except for squeeze-excite."""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks.layers import (
    ACTIVATIONS,
    MLP,
    Activation,
    DropPath,
    Grid,
    LayerScale,
    Norm,
    Pool,
    Rounding,
    Shortcut,
    SqueezeExcite,
    check_grid,
    make_divisible,
    make_norm,
    norm_activation,
    pool,
    pool_rounding,
)
from localglobal_jax.operators import grids
from localglobal_jax.operators.convolution import DepthwiseConv
from localglobal_jax.operators.dense import Dense, dot_general
from localglobal_jax.operators.kernels.batch_norm import (
    BatchNorm,
    Kernel,
    activate_product,
    covariance,
    gated_product,
    product_moments,
)
from localglobal_jax.parallel import context


class MBConvBlock(nn.Module):
    """C: inverted bottleneck, ``x + Project(SE(DepthConv(Expand(Norm(x)))))`` (CoAtNet, A.1).

    The defaults are the paper's; the other choices are those of timm's ``_rw`` families.

    Attributes:
      expansion: ratio of the hidden width to the width that `expand_from` selects.
      expand_from: "output" or "input" width.
      stride_at: where the main path strides: in the "depthwise" convolution, in the "expand" 1x1
        convolution, or by pooling before ("pool").
      pool: how the shortcut is halved. `main_pool`: how the main path is, if it pools.
      pre_activation: activation after the first norm.
      squeeze_ratio: of squeeze-excite's hidden width to the `expand_from` width ("input": to the
        expanded width); 0: no squeeze-excite. If it rounds to 0, a sixteenth of the
        expanded width is taken, at least 8.
      squeeze_early: squeeze-excite before the depthwise norm instead of after it.
      use_bias: of the projection and the shortcut; no other convolution has one.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.MBConvBlock(32, stride=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, sorted(variables)
    ((2, 4, 4, 32), ['batch_stats', 'params'])
    """

    features: int
    stride: int = 1
    expansion: PositiveFloat = 4.0
    expand_from: Literal["output", "input"] = "output"
    window: PositiveInt = 3
    stride_at: Literal["depthwise", "expand", "pool"] = "depthwise"
    pool: Pool = "avg2"
    main_pool: Pool = "avg2"
    pre_activation: bool = False
    activation: Activation = "gelu"
    squeeze_ratio: float = 0.25
    squeeze_early: bool = False
    squeeze_activation: Activation = "silu"
    use_bias: bool = True
    norm: Norm = "batch"
    norm_eps: float = 1e-5
    drop_path: float = 0.0
    dtype: str = "float32"

    @property
    def odd_grids(self) -> Rounding:
        """Rounding of a stride of 2 on an odd grid; None if the two paths round differently."""
        main = pool_rounding(self.main_pool) if self.stride_at == "pool" else "up"
        return main if main == pool_rounding(self.pool) else None

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        grids.check_input(self, x, "b h w d")
        norm = partial(make_norm, self.norm, eps=self.norm_eps, train=train, dtype=self.dtype)
        norm_act = partial(
            norm_activation,
            kind=self.norm,
            activation=self.activation,
            eps=self.norm_eps,
            train=train,
            dtype=self.dtype,
        )
        dense = partial(Dense, use_bias=False, dtype=self.dtype)
        from_output = self.expand_from == "output"
        width = make_divisible(self.expansion * (self.features if from_output else x.shape[-1]))
        squeeze = int(self.squeeze_ratio * (self.features if from_output else width))
        if self.squeeze_ratio and not squeeze:
            squeeze = make_divisible(width / 16, limit=0)
        excite = partial(
            SqueezeExcite, squeeze, self.squeeze_activation, self.dtype, name="squeeze_excite"
        )
        check_grid(x, self.stride, self.odd_grids)
        shortcut = Shortcut(
            self.features, self.stride, self.pool, self.use_bias, self.dtype, name="shortcut"
        )(x)

        fused = self.norm == "batch" and context.is_fused()
        strided = self.stride == 2 and self.stride_at != "depthwise"
        if fused and not (strided or self.pre_activation):
            y = self._expand(x.astype(self.dtype), width, train=train)
        else:
            y = norm(name="norm")(x)
            if self.pre_activation:
                y = ACTIVATIONS[self.activation](y)
            if strided and self.stride_at == "pool":
                y = pool(y, self.main_pool)
            elif strided:
                y = y[:, ::2, ::2]  # the input of a 1x1 convolution with stride 2
            y = norm_act(dense(width, name="expand")(y), name="expand_norm")
        stride = self.stride if self.stride_at == "depthwise" else 1
        y = DepthwiseConv(self.window, stride, dtype=self.dtype, name="depthwise")(y)
        if squeeze and self.squeeze_early:
            y = excite()(y)
        y = norm_act(y, name="depthwise_norm")
        product = dot_general
        if squeeze and not self.squeeze_early and fused:
            product = partial(gated_product, excite().gate(y)[:, 0, 0])
        elif squeeze and not self.squeeze_early:
            y = excite()(y)
        y = dense(self.features, use_bias=self.use_bias, dot_general=product, name="project")(y)
        return shortcut + DropPath(self.drop_path, name="drop_path")(y, train=train)

    def _expand(self, x: Grid, width: int, *, train: bool) -> Grid:
        """Computes ``act(Norm(Expand(Norm(x))))`` with both norms folded into the matrix."""
        d, batch = x.shape[-1], None
        kernel = Kernel(width, name="expand")(d)
        if train:
            mean, spread = covariance(x)
            batch = mean, jnp.maximum(jnp.diagonal(spread), 0)
        norm = BatchNorm(d, self.norm_eps, name="norm")
        before = norm(batch)
        if train:
            seen = before
            if norm.is_frozen():  # its center is not the batch's mean
                shift = (mean - before.center) * before.scale
                seen = before._replace(offset=before.offset + shift)
            batch = product_moments(spread, seen, kernel)
        after = BatchNorm(width, self.norm_eps, name="expand_norm")(batch)
        return activate_product(x, kernel, before, after, self.activation, train=train)


class ConvNeXtBlock(nn.Module):
    """N: ``x + MLP(Norm(DepthConv(x)))`` (arXiv 2201.03545, figure 4), nothing before the operator.

    The depthwise convolution may widen: its input is then repeated, output channel c reads input
    channel c // (features / width of x).

    Attributes:
      stride_at: where the main path strides: in the "depthwise" convolution or before it ("pool").
      main_pool: how the main path is halved, if it pools; the shortcut averages 2 x 2.
      layer_scale: initial value of LayerScale; None or 0: no LayerScale.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.ConvNeXtBlock(32, stride=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 32)
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
        """Rounding of a stride of 2 on an odd grid; None if the two paths round differently."""
        both_down = self.stride_at == "pool" and pool_rounding(self.main_pool) == "down"
        return "down" if both_down else None

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        grids.check_input(self, x, "b h w d")
        repeats, rest = divmod(self.features, x.shape[-1])
        if rest:
            raise ValueError(
                f"ConvNeXt block: width {self.features} is not a multiple of its input's width "
                f"{x.shape[-1]}; its depthwise convolution can only repeat channels"
            )
        check_grid(x, self.stride, self.odd_grids)
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
