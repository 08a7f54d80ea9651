# SPDX-License-Identifier: Apache-2.0
"""CoAtNet (arXiv 2106.04803): convolution stages, then stages of relative attention.

A convolutional stem (S0), then stages S1..S4 of blocks named by letters, each halving the grid;
any layout of letters, depths and widths is a model. Named sizes follow the paper's table 3. Where
paper and public code leave a choice, the defaults are those of timm's paper-style ``coatnet_0``
(stride in the depthwise convolution, a tanh layer before the classifier).
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float

from localglobal_jax import layout as layouts
from localglobal_jax.stems_heads import ConvStem, PoolingHead

VARIANTS: dict[str, dict[str, Any]] = {  # the paper's table 3 (stem width, depths, widths)
    "coatnet_0": {"stem": (64, 64), "depths": (2, 3, 5, 2), "widths": (96, 192, 384, 768)},
    "coatnet_1": {"stem": (64, 64), "depths": (2, 6, 14, 2), "widths": (96, 192, 384, 768)},
    "coatnet_2": {"stem": (128, 128), "depths": (2, 6, 14, 2), "widths": (128, 256, 512, 1024)},
    "coatnet_3": {"stem": (192, 192), "depths": (2, 6, 14, 2), "widths": (192, 384, 768, 1536)},
    "coatnet_4": {"stem": (192, 192), "depths": (2, 12, 28, 2), "widths": (192, 384, 768, 1536)},
    "coatnet_5": {
        "stem": (192, 192),
        "depths": (2, 12, 28, 2),
        "widths": (256, 512, 1280, 2048),
        "blocks": {"T": {"head_width": 64}},
    },
}
for _spec in VARIANTS.values():
    _spec["head_hidden"] = _spec["widths"][-1]


class CoAtNet(nn.Module):
    """Images [b, h, w, channels] -> (logits [b, classes], intermediates).

    `intermediates` holds the output of "stem", every "stage1".. and "features", what the classifier
    reads. Each stride of 2 needs an even grid: with the default strides, height and width are
    multiples of 32 (the stem alone may round up).

    Attributes:
      classes: number of logits; 0: no classifier, "features" come out in place of logits.
      layout: a letter (or a string of letters) per stage; see `layout.parse` and `blocks.BLOCKS`.
      depths, widths, strides: per stage; strides None: 2 everywhere.
      stem: widths of the two stem convolutions. `stem_stride`: of the first one.
      stem_activation: between the two.
      blocks: options per letter, e.g. ``{"T": {"head_width": 64}}``.
      head_hidden: width of the tanh layer before the classifier; 0: none.
      head_norm, head_norm_first: see `PoolingHead`.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dtype: of the activations; parameters, norm statistics and logits are float32.
    """

    classes: int = 1000
    layout: str | tuple[str, ...] = "CCTT"
    depths: tuple[int, ...] = (2, 3, 5, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    strides: tuple[int, ...] | None = None
    stem: tuple[int, int] = (64, 64)
    stem_stride: int = 2
    stem_activation: str = "gelu"
    blocks: Mapping[str, Mapping[str, Any]] = FrozenDict()
    head_hidden: int = 0
    head_norm: str = "layer"
    head_norm_first: bool = False
    drop_path: float = 0.0
    dtype: str = "float32"

    def stages(self) -> tuple[layouts.Stage, ...]:
        """The parsed layout."""
        return layouts.parse(self.layout, self.depths, self.widths, self.strides)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, Array]]:
        stages = self.stages()
        check_grid((x.shape[1], x.shape[2]), self.stem_stride, stages)
        layouts.check_options(self.blocks)
        x = ConvStem(
            self.stem, self.stem_stride, self.stem_activation, dtype=self.dtype, name="stem"
        )(x.astype(self.dtype), train=train)
        intermediates = {"stem": x}
        rates = layouts.drop_path_rates(stages, self.drop_path)
        for i, (stage, rate) in enumerate(zip(stages, rates, strict=True), start=1):
            x = layouts.BlockStage(stage, self.blocks, rate, self.dtype, name=f"stage{i}")(
                x, train=train
            )
            intermediates[f"stage{i}"] = x
        wide = jnp.promote_types(self.dtype, jnp.float32)  # the head is never in bfloat16
        logits, features = PoolingHead(
            self.classes,
            norm=self.head_norm,
            norm_first=self.head_norm_first,
            hidden=self.head_hidden,
            dtype=wide.name,
            name="head",
        )(x.astype(wide), train=train)
        return logits, {**intermediates, "features": features}


def check_grid(size: tuple[int, int], stem_stride: int, stages: tuple[layouts.Stage, ...]) -> None:
    """Raises ValueError unless every strided stage finds a grid that it can divide."""
    total = stem_stride * math.prod(stage.stride for stage in stages)
    grid = [-(-n // stem_stride) for n in size]
    for i, stage in enumerate(stages, start=1):
        if any(n % stage.stride for n in grid):
            lower = [max(n // total, 1) * total for n in size]
            raise ValueError(
                f"image {size[0]}x{size[1]}: stage {i} cannot halve a grid of {grid[0]}x{grid[1]}. "
                f"With these strides height and width must be multiples of {total}, "
                f"for instance {lower[0]}x{lower[1]} or {lower[0] + total}x{lower[1] + total}"
            )
        grid = [n // stage.stride for n in grid]
