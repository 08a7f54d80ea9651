# SPDX-License-Identifier: Apache-2.0
"""Focal Transformer (arXiv 2107.00641): stages of focal attention on ever coarser grids.

A patch embedding, then stages of blocks; every stage but the first begins with a strided
convolution that doubles the width. It computes the same as the authors' published code (their
first models; ``focalv2_*`` are their second, "fast" ones, which have no paper). Other layouts of
block letters work too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float
from pydantic import PositiveFloat, PositiveInt

from localglobal_jax.blocks import BLOCKS
from localglobal_jax.models import layout as layouts
from localglobal_jax.models.heads import PoolingHead
from localglobal_jax.models.stems import PatchEmbed
from localglobal_jax.operators.focal import PoolMethod
from localglobal_jax.operators.grids import check_input

_SIZES: dict[str, dict[str, Any]] = {  # table 1 of the paper
    "tiny": {"depths": (2, 2, 6, 2), "widths": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "small": {"depths": (2, 2, 18, 2), "widths": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "base": {"depths": (2, 2, 18, 2), "widths": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"focal_{size}": spec for size, spec in _SIZES.items()},
    **{f"focal_{size}_useconv": {**spec, "conv_embed": True} for size, spec in _SIZES.items()},
    **{
        f"focalv2_{size}": {**spec, "conv_embed": True, "nearest": 128}
        for size, spec in _SIZES.items()
    },
}
# Parameters, multiply-adds, image size; the paper's table 2 and the repository.
FIGURES: dict[str, tuple[float, float | None, int]] = {
    "focal_tiny": (29.1e6, 4.9e9, 224),
    "focal_small": (51.1e6, 9.4e9, 224),
    "focal_base": (89.8e6, 16.4e9, 224),
    "focal_tiny_useconv": (30.8e6, None, 224),
    "focal_small_useconv": (53.1e6, None, 224),
    "focalv2_tiny": (30.2e6, None, 224),
    "focalv2_small": (51.5e6, None, 224),
    "focalv2_base": (91.2e6, None, 224),
}


class FocalTransformer(nn.Module):
    """Images [b, h, w, channels] -> (logits [b, classes], intermediates).

    `intermediates` holds the output of "stem", every "stage1".. and "features", the input of the
    classifier. Any image size works: grids are padded to whole windows.

    Attributes:
      classes: number of logits; 0: no classifier, "features" are returned instead.
      layout: a letter (or a string of letters) per stage; see `layout.parse` and `blocks.BLOCKS`.
      depths, widths, heads: per stage. The next fields are those of its F blocks.
      window: side of the windows. `expand`, `levels`, `focal_windows`: per stage, see
        `operators.focal.FocalAttention`; `focal_pool`: its `pool`.
      expand_except: blocks of a stage, counted from 0, that see no neighbours.
      shift: cyclic shift by half a window in every second block (Swin).
      nearest: keys per level of the "fast" attention (`operators.focal_nearest`); 0: the paper's.
      image_size: chooses the windows: a stage whose grid is no larger than the window gets
        one window and no neighbours. The parameters serve images of any other size too.
      patch: side of a patch. `conv_embed`: overlapping convolutions instead: 7x7 stride 4, 3x3
        stride 2. Then an odd grid rounds up (an error in the reference); else it rounds down.
      stem_norm: LayerNorm after the patch embedding. `pre_norm`: GroupNorm before the others.
      position_embedding: an absolute one after the stem; resized bilinearly to other grids.
      expansion, qkv_bias, scale, layer_scale: of the blocks.
      blocks: options per letter, over those above, e.g. ``{"F": {"focal_window": 3}}``.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dtype: of the activations; parameters, norm statistics and logits are float32.

    >>> module = lg.models.FocalTransformer(
    ...     classes=10, layout="FF", depths=(1, 1), widths=(32, 64), heads=(2, 2), image_size=64,
    ...     expand=(3, 3), levels=(2, 2), focal_windows=(3, 1),
    ... )
    >>> images = jnp.ones((2, 64, 64, 3))
    >>> (logits, stages), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    >>> logits.shape, stages["stage2"].shape
    ((2, 10), (2, 8, 8, 64))
    """

    classes: int = 1000
    layout: str | tuple[str, ...] = "FFFF"
    depths: tuple[int, ...] = (2, 2, 6, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: PositiveInt = 7
    expand: tuple[int, ...] = (3, 3, 3, 3)
    levels: tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: tuple[int, ...] = (7, 5, 3, 1)
    focal_pool: PoolMethod = "fc"
    expand_except: Literal["none", "even", "odd"] = "none"
    shift: bool = False
    nearest: int = 0
    image_size: int | tuple[int, int] = 224
    patch: PositiveInt = 4
    conv_embed: bool = False
    stem_norm: bool = True
    pre_norm: bool = False
    position_embedding: bool = False
    expansion: PositiveFloat = 4.0
    qkv_bias: bool = True
    scale: float | None = None
    layer_scale: float | None = None
    blocks: Mapping[str, Mapping[str, Any]] = FrozenDict()
    drop_path: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.blocks = layouts.hashable(self.blocks)
        super().__post_init__()

    @nn.nowrap
    def stages(self) -> tuple[layouts.Stage, ...]:
        """The parsed layout; the strides are those of the convolutions between the stages."""
        strides = (1, *(2,) * (len(self.layout) - 1))
        return layouts.parse(self.layout, self.depths, self.widths, strides)

    @nn.nowrap
    def grid(self, stage: int) -> tuple[int, int]:
        """The grid of a stage (counted from 0) for images of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        # both halvings round down, as in the reference; a grid has at least one position
        return max(height // self.patch >> stage, 1), max(width // self.patch >> stage, 1)

    @nn.nowrap
    def block_options(self, stage: int, index: int) -> dict[str, dict[str, Any]]:
        """Options per letter for block `index` of a stage, both counted from 0."""
        odd = index % 2 == 1
        without = self.expand_except == ("odd" if odd else "even")
        shared = {
            "head_width": self.widths[stage] // self.heads[stage],
            "expansion": self.expansion,
            "qkv_bias": self.qkv_bias,
            "layer_scale": self.layer_scale,
        }
        focal = {
            **shared,
            "window": self.window,
            "expand": 0 if without else self.expand[stage],
            "levels": self.levels[stage],
            "focal_window": self.focal_windows[stage],
            "focal_pool": self.focal_pool,
            "shift": self.window // 2 if self.shift and odd else 0,
            "scale": self.scale,
            "nearest": self.nearest,
            "grid": self.grid(stage),
        }
        defaults = {letter: _known(letter, shared) for letter in BLOCKS} | {"F": focal}
        return {k: {**default, **self.blocks.get(k, {})} for k, default in defaults.items()}

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, Array]]:
        check_input(self, x, "b h w channels")
        stages = self.stages()
        self._check((x.shape[1], x.shape[2]))
        x = PatchEmbed(
            self.widths[0],
            *((7, 4, 2) if self.conv_embed else (self.patch, self.patch, 0)),
            norm=self.stem_norm,
            dtype=self.dtype,
            name="stem",
        )(x.astype(self.dtype), train=train)
        if self.position_embedding:
            shape = (*self.grid(0), self.widths[0])
            position = self.param("position", nn.initializers.normal(0.02), shape, jnp.float32)
            position = jax.image.resize(position, x.shape[1:], "bilinear")
            x = x + position[None].astype(self.dtype)
        intermediates = {"stem": x}
        rates = layouts.drop_path_rates(stages, self.drop_path)
        for i, stage in enumerate(stages):
            letters = enumerate(stage.letters)
            x = layouts.BlockStage(
                stage,
                tuple(self.block_options(i, j)[letter] for j, letter in letters),
                rates[i],
                self.dtype,
                self._downsample(stage.width) if i else None,
                name=f"stage{i + 1}",
            )(x, train=train)
            intermediates[f"stage{i + 1}"] = x
        wide = jnp.promote_types(self.dtype, jnp.float32)  # the head is never in bfloat16
        logits, features = PoolingHead(
            self.classes, norm="layer", norm_first=True, norm_eps=1e-5, dtype=wide.name, name="head"
        )(x.astype(wide), train=train)
        return logits, {**intermediates, "features": features}

    @nn.nowrap
    def _downsample(self, width: int) -> PatchEmbed:
        """Returns the convolution before a stage, the stage's submodule "downsample"."""
        convolution = (3, 2, 1) if self.conv_embed else (2, 2, 0)
        return PatchEmbed(
            width, *convolution, pre_norm=self.pre_norm, dtype=self.dtype, parent=None
        )

    @nn.nowrap
    def _check(self, size: tuple[int, int]) -> None:
        """Raises ValueError for fields that disagree, and for images too small for the stages."""
        layouts.check_options(self.blocks)
        for name in ("heads", "expand", "levels", "focal_windows"):
            if len(getattr(self, name)) != len(self.layout):
                raise ValueError(
                    f'layout "{self.layout}" names {len(self.layout)} stages, '
                    f"but {name}={getattr(self, name)} has {len(getattr(self, name))}"
                )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} is not divisible by {heads} heads")
        if self.conv_embed and self.patch != 4:
            raise ValueError(f"conv_embed has stride 4, but patch={self.patch}: set patch=4")
        smallest = self.patch << (len(self.layout) - 1)
        if min(size) < smallest:
            raise ValueError(
                f"image {size[0]}x{size[1]} is too small: {len(self.layout)} stages after patches "
                f"of {self.patch} need at least {smallest}x{smallest}"
            )


def _known(letter: str, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(BLOCKS[letter])}
    return {name: value for name, value in options.items() if name in fields}
