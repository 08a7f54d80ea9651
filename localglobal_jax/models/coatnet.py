# SPDX-License-Identifier: Apache-2.0
"""CoAtNet (arXiv 2106.04803): convolution stages, then stages of relative attention.

A convolutional stem (S0), then stages S1..S4 of blocks named by letters, each halving the grid;
any layout of letters, depths and widths is a model. Named ones are in `coatnet_variants`. Where
paper and public code leave a choice, the defaults are those of timm's paper-style ``coatnet_0``
(stride in the depthwise convolution, a tanh layer before the classifier).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float
from pydantic import PositiveInt

from localglobal_jax.blocks.layers import Activation, Norm
from localglobal_jax.models import layout as layouts
from localglobal_jax.models.coatnet_variants import VARIANTS
from localglobal_jax.models.heads import PoolingHead
from localglobal_jax.models.stems import ConvStem, PatchStem
from localglobal_jax.operators.grids import check_input

__all__ = ["VARIANTS", "CoAtNet"]


class CoAtNet(nn.Module):
    """Images [b, h, w, channels] -> (logits [b, classes], intermediates).

    `intermediates` holds the output of "stem", every "stage1".. and "features", the input of
    the classifier. Each stride of 2 needs an even grid: by default, height and width are
    multiples of 32. Only the stem and blocks with `odd_grids` may round up.

    Attributes:
      classes: number of logits; 0: no classifier, "features" are returned instead.
      layout: a letter (or a string of letters) per stage; see `layout.parse` and `blocks.BLOCKS`.
      depths, widths, strides: per stage; strides None: 2 everywhere.
      stem: widths of the two stem convolutions; a single width: patches, projected (`PatchStem`).
      stem_stride: of the first convolution, or the size of a patch.
      stem_activation, stem_norm, stem_norm_eps: between the two convolutions. `stem_bias`: of both.
      blocks: options per letter, e.g. ``{"T": {"head_width": 64}}``.
      head_hidden: width of the tanh layer before the classifier; 0: none.
      head_norm, head_norm_first, head_norm_eps: see `PoolingHead`.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dtype: of the activations; parameters are float32, norm statistics and logits at least.

    >>> module = lg.models.CoAtNet(classes=10, depths=(1, 1, 1, 1), widths=(32, 32, 64, 64))
    >>> images = jnp.ones((2, 64, 96, 3))
    >>> (logits, stages), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    >>> logits.shape, stages["stage4"].shape
    ((2, 10), (2, 2, 3, 64))
    """

    classes: int = 1000
    layout: str | tuple[str, ...] = "CCTT"
    depths: tuple[int, ...] = (2, 3, 5, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    strides: tuple[int, ...] | None = None
    stem: tuple[PositiveInt, ...] = (64, 64)
    stem_stride: PositiveInt = 2
    stem_activation: Activation = "gelu"
    stem_bias: bool = False
    stem_norm: Norm = "batch"
    stem_norm_eps: float = 1e-5
    blocks: Mapping[str, Mapping[str, Any]] = FrozenDict()
    head_hidden: int = 0
    head_norm: Norm = "layer"
    head_norm_first: bool = False
    head_norm_eps: float = 1e-6
    drop_path: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.blocks = layouts.hashable(self.blocks)
        super().__post_init__()

    @nn.nowrap
    def stages(self) -> tuple[layouts.Stage, ...]:
        """The parsed layout."""
        return layouts.parse(self.layout, self.depths, self.widths, self.strides)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, Array]]:
        check_input(self, x, "b h w channels")
        stages = self.stages()
        patches = len(self.stem) == 1
        if len(self.stem) > 2 or not self.stem:
            raise ValueError(
                f"stem={tuple(self.stem)}: two widths (convolutions) or one (patches) are allowed"
            )
        layouts.check_options(self.blocks)
        check_grid(
            (x.shape[1], x.shape[2]),
            stages,
            stem_stride=self.stem_stride,
            patches=patches,
            blocks=self.blocks,
        )
        stem = (
            PatchStem(self.stem[0], self.stem_stride, self.dtype, name="stem")
            if patches
            else ConvStem(
                self.stem,
                self.stem_stride,
                self.stem_activation,
                use_bias=self.stem_bias,
                norm=self.stem_norm,
                norm_eps=self.stem_norm_eps,
                dtype=self.dtype,
                name="stem",
            )
        )
        x = stem(x.astype(self.dtype), train=train)
        intermediates = {"stem": x}
        rates = layouts.drop_path_rates(stages, self.drop_path)
        for i, (stage, rate) in enumerate(zip(stages, rates, strict=True), start=1):
            options = tuple(self.blocks.get(letter, {}) for letter in stage.letters)
            x = layouts.BlockStage(stage, options, rate, self.dtype, name=f"stage{i}")(
                x, train=train
            )
            intermediates[f"stage{i}"] = x
        wide = jnp.promote_types(self.dtype, jnp.float32)  # the head is never in bfloat16
        logits, features = PoolingHead(
            self.classes,
            norm=self.head_norm,
            norm_first=self.head_norm_first,
            norm_eps=self.head_norm_eps,
            hidden=self.head_hidden,
            dtype=wide.name,
            name="head",
        )(x.astype(wide), train=train)
        return logits, {**intermediates, "features": features}


def check_grid(
    size: tuple[int, int],
    stages: Sequence[layouts.Stage],
    *,
    stem_stride: int,
    patches: bool,
    blocks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raises ValueError, with sizes that fit, unless every strided stage can halve its grid.

    A convolutional stem rounds up, a stem of `patches` must divide. A block halves even grids; one
    with `odd_grids` halves odd ones too.
    """
    if patches and any(n % stem_stride for n in size):
        raise ValueError(
            f"image {size[0]}x{size[1]} does not divide into patches of {stem_stride}: use "
            f"{_nearest(size, stem_stride)}"
        )
    grid = [-(-n // stem_stride) for n in size]
    total = stem_stride * math.prod(stage.stride for stage in stages)
    channels = " (images are [b, h, w, channels])" if size[0] in (1, 3) else ""
    for i, stage in enumerate(stages, start=1):
        if stage.stride == 1:
            continue
        odd = layouts.odd_grids(stage.letters[0], blocks)
        if any((n % 2 and not odd) or n < 2 for n in grid):
            raise ValueError(
                f"image {size[0]}x{size[1]}: stage {i} cannot halve its {grid[0]}x{grid[1]} grid; "
                f"with these strides height and width must be multiples of {total}, "
                f"for instance {_nearest(size, total)}{channels}"
            )
        grid = [n // 2 if odd == "down" else -(-n // 2) for n in grid]


def _nearest(size: tuple[int, int], multiple: int) -> str:
    below = tuple(n // multiple * multiple for n in size)
    above = tuple(-(-n // multiple) * multiple for n in size)
    return " or ".join(f"{h}x{w}" for h, w in dict.fromkeys((below, above)) if h and w)
