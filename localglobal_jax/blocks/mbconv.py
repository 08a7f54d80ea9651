# SPDX-License-Identifier: Apache-2.0
"""C: the inverted bottleneck, LOCAL but for its squeeze-excite."""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from localglobal_jax import step_context
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks.residual import (
    ACTIVATIONS,
    Activation,
    DropPath,
    Grid,
    Norm,
    Pool,
    Rounding,
    Shortcut,
    SqueezeExcite,
    make_divisible,
    make_norm,
    pool,
    pool_rounding,
)
from localglobal_jax.operators.convolution import DepthwiseConv
from localglobal_jax.operators.normalized import BatchNorm, activate, activate_product, covariance, gated_product, moments


class DenseKernel(nn.Module):
    features: int
    @nn.compact
    def __call__(self, x):
        return self.param("kernel", nn.linear.default_kernel_init, (x.shape[-1], self.features))


class MBConv(nn.Module):
    """C: inverted bottleneck, ``x + Project(SE(DepthConv(Expand(Norm(x)))))`` (CoAtNet, A.1).

    The defaults are the paper's; the other choices are those of timm's ``_rw`` families.

    Attributes:
      expansion: hidden width over the width that `expand_from` names.
      expand_from: "output" or "input" width.
      stride_at: where the main path strides: in the "depthwise" convolution, in the "expand" 1x1
        convolution, or by pooling before ("pool").
      pool: how the shortcut is halved. `main_pool`: how the main path is, if it pools.
      pre_activation: activation after the first norm.
      squeeze_ratio: of squeeze-excite's hidden width to the `expand_from` width ("input": to the
        expanded width); 0: no squeeze-excite. Where it rounds to nothing, a sixteenth of the
        expanded width is taken, at least 8.
      squeeze_early: squeeze-excite before the depthwise norm instead of after it.
      use_bias: of the projection and the shortcut; no other convolution has one.
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
        """How a stride of 2 halves an odd grid: both paths must round alike."""
        main = pool_rounding(self.main_pool) if self.stride_at == "pool" else "up"
        return main if main == pool_rounding(self.pool) else None

    @nn.compact
    def __call__(self, x: Grid, *, train: bool = False) -> Grid:
        norm = partial(make_norm, self.norm, eps=self.norm_eps, train=train, dtype=self.dtype)
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        act = ACTIVATIONS[self.activation]
        from_output = self.expand_from == "output"
        width = make_divisible(self.expansion * (self.features if from_output else x.shape[-1]))
        squeeze = int(self.squeeze_ratio * (self.features if from_output else width))
        if self.squeeze_ratio and not squeeze:
            squeeze = make_divisible(width / 16, limit=0)
        excite = partial(
            SqueezeExcite, squeeze, self.squeeze_activation, self.dtype, name="squeeze_excite"
        )
        shortcut = Shortcut(
            self.features, self.stride, self.pool, self.use_bias, self.dtype, name="shortcut"
        )(x)

        if step_context.formulation() == "tuned" and self.norm == "batch" and not self.pre_activation and (self.stride == 1 or self.stride_at == "depthwise"):
            bn = partial(BatchNorm, self.norm_eps)
            kernel = DenseKernel(width, name="expand")(x)
            mean, cov = covariance(x)
            before = bn(name="norm")(mean, jnp.maximum(jnp.diagonal(cov), 0), train=train)
            scaled = before.scale[:, None] * kernel
            after = bn(name="expand_norm")(before.offset @ kernel, jnp.maximum(jnp.sum(scaled * jnp.matmul(cov, scaled, precision="highest"), 0), 0), train=train)
            y = activate_product(x, kernel, before, after, self.activation)
            tuned=True
        else:
            tuned=False
            y = norm(name="norm")(x)
            if self.pre_activation:
                y = act(y)
            if self.stride == 2 and self.stride_at == "pool":
                y = pool(y, self.main_pool)
            if self.stride == 2 and self.stride_at == "expand":
                y = y[:, ::2, ::2]  # what a 1x1 convolution with stride 2 reads
            y = act(norm(name="expand_norm")(dense(width, name="expand")(y)))
        stride = self.stride if self.stride_at == "depthwise" else 1
        conv = DepthwiseConv(self.window, stride, dtype=self.dtype, name="depthwise")
        y = conv(y)
        if squeeze and self.squeeze_early:
            y = excite()(y)
        if step_context.formulation() == "tuned" and self.norm == "batch":
            y = activate(y, BatchNorm(self.norm_eps, name="depthwise_norm")(*moments(y), train=train), self.activation)
        else:
            y = act(norm(name="depthwise_norm")(y))
        if tuned and squeeze and not self.squeeze_early:
            gate = excite().gate(y)
            def gated(y, kernel, *_, **__): return gated_product(y, gate[:, 0, 0], kernel)
            y = dense(self.features, use_bias=self.use_bias, dot_general=gated, name="project")(y)
        else:
          if squeeze and not self.squeeze_early:
            y = excite()(y)
          y = dense(self.features, use_bias=self.use_bias, name="project")(y)
        return shortcut + DropPath(self.drop_path, name="drop_path")(y, train=train)
