# SPDX-License-Identifier: Apache-2.0
"""VOLO, the vision outlooker (arXiv 2106.13112): fine tokens locally, then coarse ones globally.

A stem of convolutions makes tokens of 8x8 pixels; outlookers enrich them; a 2x2 convolution halves
the grid; a position embedding is added once, and plain attention follows; class attention reads the
result. Named sizes follow the paper's table 2; a second classifier serves token labelling.
Deviation from the authors' code: S blocks and MLPs are initialised as elsewhere in this package
(Xavier; theirs: normal, 0.02).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float
from pydantic import PositiveInt

from localglobal_jax.blocks import BLOCKS
from localglobal_jax.models import layout as layouts
from localglobal_jax.models.heads import ClassAttentionHead
from localglobal_jax.models.mix_token import NO_BOX, sample_box, swap
from localglobal_jax.models.stems import ConvPatchStem, patch_grid
from localglobal_jax.operators.grids import check_input

_D4: dict[str, Any] = {"widths": (384, 768, 768, 768), "heads": (12, 16, 16, 16)}
_D2: dict[str, Any] = {"widths": (256, 512, 512, 512), "heads": (8, 16, 16, 16)}
VARIANTS: dict[str, dict[str, Any]] = {  # the paper's table 2
    "volo_d1": {},
    "volo_d2": {"depths": (6, 4, 10, 4), **_D2},
    "volo_d3": {"depths": (8, 8, 16, 4), **_D2},
    "volo_d4": {"depths": (8, 8, 16, 4), **_D4},
    "volo_d5": {"depths": (12, 12, 20, 4), **_D4, "stem": 128, "expansion": 4.0},
}
# Parameters, multiply-adds (not known), image size; the paper's table 2.
FIGURES: dict[str, tuple[float, float | None, int]] = {
    f"volo_d{i}": (parameters, None, 224)
    for i, parameters in enumerate((27e6, 59e6, 86e6, 193e6, 296e6), start=1)
}


class VOLO(nn.Module):
    """Images [b, h, w, channels] -> (logits [b, classes], intermediates).

    In evaluation the logits are those of the class plus half the largest of the tokens'
    ("class_logits" and "aux_logits" [b, i, j, classes] among the intermediates). In training they
    are those of the class alone, and a loss for token labelling takes "aux_logits" and "mix_box"
    (see `mix_token`) from the intermediates; the rng stream is "dropout". Beside these,
    `intermediates` holds the output of "stem", every "stage1".. and "features", the
    input of the classifier.

    Any image size works: stem and strides drop pixels that do not fill a patch. The position
    embedding is as large as the images of `init`; for another size, see `convert.adapt`.

    Attributes:
      classes: number of logits; 0: no classifiers, "features" are returned instead.
      layout: a letter (or a string of letters) per stage; see `layout.parse` and `blocks.BLOCKS`.
      depths, widths, strides: per stage. Where a stage strides or changes width, a convolution
        with as large a window comes before its blocks.
      heads: per stage, for blocks that have heads; the last also counts for class attention.
      expansion: of the MLPs of those blocks, one for all or per stage.
      stem: width of the stem's convolutions. `patch`: side of a token, in pixels.
      position: the stage before whose blocks the position embedding is added; 0: none.
      class_blocks: number of class attention blocks; 0: the tokens' average is classified.
      aux_head: the classifier of every token.
      mix_token: mixes two images' tokens in training. Only for a loss that reads "mix_box".
      qkv_bias: biases of queries, keys and values, also of outlook attention's values.
      blocks: options per letter, e.g. ``{"O": {"window": 5}}``.
      drop_path: stochastic depth of the last block, growing linearly from 0; none in O blocks.
      dtype: of the activations; parameters, norm statistics and logits are float32.

    >>> module = lg.models.VOLO(
    ...     classes=10, layout="OS", depths=(1, 1), widths=(32, 64), strides=(1, 2), heads=(2, 2)
    ... )
    >>> images = jnp.ones((2, 64, 64, 3))
    >>> (logits, stages), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    >>> logits.shape, stages["aux_logits"].shape
    ((2, 10), (2, 4, 4, 10))
    """

    classes: int = 1000
    layout: str | tuple[str, ...] = "OSSS"
    depths: tuple[int, ...] = (4, 4, 8, 2)
    widths: tuple[int, ...] = (192, 384, 384, 384)
    strides: tuple[int, ...] = (1, 2, 1, 1)
    heads: tuple[int, ...] = (6, 12, 12, 12)
    expansion: float | tuple[float, ...] = 3.0
    stem: int = 64
    patch: PositiveInt = 8
    position: int = 2
    class_blocks: int = 2
    aux_head: bool = True
    mix_token: bool = False
    qkv_bias: bool = False
    blocks: Mapping[str, Mapping[str, Any]] = FrozenDict()
    drop_path: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.blocks = layouts.hashable(self.blocks)
        super().__post_init__()

    @nn.nowrap
    def stages(self) -> tuple[layouts.Stage, ...]:
        """The parsed layout."""
        return layouts.parse(self.layout, self.depths, self.widths, self.strides)

    @nn.nowrap
    def grids(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The grid after the stem and in every stage for images of `size` (height, width).

        Raises ValueError if nothing is left of the image.
        """
        grids = [patch_grid(size, self.patch)]
        for stage in self.stages():
            height, width = grids[-1]
            grids.append((height // stage.stride, width // stage.stride))
        if min(grids[-1]) < 1:
            least = self.patch * math.prod(stage.stride for stage in self.stages())
            raise ValueError(
                f"image {size[0]}x{size[1]} is smaller than the {least}x{least} pixels of a token "
                f"of the last stage: use images of at least {least}x{least}"
            )
        return tuple(grids)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, Array]]:
        check_input(self, x, "b h w channels")
        stages, per_stage = self.stages(), self._per_stage()
        grids = self.grids((x.shape[1], x.shape[2]))
        layouts.check_options(self.blocks)
        if self.mix_token and not self.aux_head:
            raise ValueError(
                "mix_token=True needs aux_head=True: set aux_head=True or mix_token=False"
            )

        x = ConvPatchStem(self.stem, self.widths[0], self.patch, dtype=self.dtype, name="stem")(
            x.astype(self.dtype), train=train
        )
        intermediates = {"stem": x}
        box = jnp.array(NO_BOX)
        if train and self.mix_token:
            box = sample_box(self.make_rng("dropout"), grids[-1])
            x = swap(x, box, scale=math.prod(stage.stride for stage in stages))

        rates = layouts.drop_path_rates(stages, self.drop_path)
        for i, (stage, rate) in enumerate(zip(stages, rates, strict=True), start=1):
            if stage.stride > 1 or stage.width != x.shape[-1]:
                window = (stage.stride, stage.stride)
                x = nn.Conv(
                    stage.width,
                    window,
                    window,
                    padding="VALID",
                    dtype=self.dtype,
                    name=f"downsample{i}",
                )(x)
            if i == self.position:
                x = x + self._position(grids[i], stage.width).astype(x.dtype)
            # As in the authors' code, outlookers count in this schedule but have no drop path.
            letters = zip(stage.letters, rate, strict=True)
            rate_here = tuple(0.0 if letter == "O" else r for letter, r in letters)
            options = self._options(stage, *per_stage[i - 1])
            x = layouts.BlockStage(
                dataclasses.replace(stage, stride=1),
                tuple(options.get(letter, {}) for letter in stage.letters),
                rate_here,
                self.dtype,
                name=f"stage{i}",
            )(x, train=train)
            intermediates[f"stage{i}"] = x

        heads, expansion = per_stage[-1]
        logits, aux, features = ClassAttentionHead(
            self.classes,
            self.class_blocks,
            heads,
            expansion,
            self.qkv_bias,
            self.aux_head,
            dtype=self.dtype,
            name="head",
        )(x, train=train)
        intermediates |= {"features": features, "class_logits": logits}
        if aux is None:
            return logits, intermediates
        if train:
            return logits, {**intermediates, "mix_box": box, "aux_logits": swap(aux, box)}
        return logits + 0.5 * aux.max((1, 2)), {**intermediates, "aux_logits": aux}

    @nn.nowrap
    def _per_stage(self) -> list[tuple[int, float]]:
        """Heads and expansion of every stage."""
        count = len(self.layout)
        factor = self.expansion
        expansions = factor if isinstance(factor, tuple) else (factor,) * count
        lists: dict[str, tuple[float, ...]] = {"heads": self.heads, "expansion": expansions}
        for name, values in lists.items():
            if len(values) != count:
                raise ValueError(
                    f'layout "{self.layout}" names {count} stages, '
                    f"but {name}={tuple(values)} has {len(values)}"
                )
        if not 0 <= self.position <= count:
            raise ValueError(
                f"position={self.position} is not one of the {count} stages (1 is the first); "
                "0: no position embedding"
            )
        return list(zip(self.heads, expansions, strict=True))

    @nn.nowrap
    def _options(self, stage: layouts.Stage, heads: int, expansion: float) -> layouts.Options:
        """Returns the options of a stage's blocks that have heads; `blocks` overrides them."""
        options = dict(self.blocks)
        for letter in set(stage.letters):
            fields = {field.name for field in dataclasses.fields(BLOCKS[letter])}
            if not fields & {"heads", "head_width"}:
                continue
            if heads < 1 or stage.width % heads:
                raise ValueError(f"a stage's width {stage.width} is not divisible by heads={heads}")
            attention = {
                "heads": heads,
                "head_width": stage.width // heads,
                "expansion": expansion,
                "qkv_bias": self.qkv_bias,
                "norm_eps": 1e-5,
            }
            known = {name: value for name, value in attention.items() if name in fields}
            options[letter] = {**known, **options.get(letter, {})}
        return options

    def _position(self, grid: tuple[int, int], width: int) -> Float[Array, "1 h w d"]:
        shape = (*grid, width)
        if self.has_variable("params", "position"):
            held: tuple[int, ...] = self.get_variable("params", "position").shape
            if held != shape:
                raise ValueError(
                    f"the position embedding is for a {held[0]}x{held[1]} grid of width {held[2]}, "
                    f"these images give {grid[0]}x{grid[1]} of width {width}: "
                    "for another image size, use convert.adapt.resize(module, variables, size)"
                )
        return self.param("position", nn.initializers.normal(0.02), shape, jnp.float32)[None]
