# SPDX-License-Identifier: Apache-2.0
"""Layouts: models in sequence, as data. ``"CCTT"`` is four stages; a letter is a block.

A stage is a string of block letters: one letter repeats (``"C"``), a pattern that divides the
depth repeats (``"CT"`` at depth 4 is C T C T), and a string as long as the depth names every block.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import FrozenDict, freeze
from jaxtyping import Array, Float

from localglobal_jax.blocks import BLOCKS
from localglobal_jax.blocks.layers import Rounding
from localglobal_jax.blocks.stack import apply_blocks
from localglobal_jax.config import validation, values

Options = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks at one resolution: one letter each, their width, and the stride of the first."""

    letters: str
    width: int
    stride: int


def parse(
    layout: str | Sequence[str],
    depths: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int] | None = None,
    *,
    blocks: Mapping[str, type[nn.Module]] = BLOCKS,
) -> tuple[Stage, ...]:
    """Parses the stages of a layout; strides default to 2. Raises ValueError if lengths differ."""
    strides = (2,) * len(layout) if strides is None else strides
    for name, given in (("depths", depths), ("widths", widths), ("strides", strides)):
        if len(given) != len(layout):
            raise ValueError(
                f'layout "{_show(layout)}" names {len(layout)} stages, '
                f"but {name}={tuple(given)} has {len(given)}"
            )
        if min(given, default=1) < 1:
            raise ValueError(f"{name}={tuple(given)}: give at least 1 for every stage")
    if not set(strides) <= {1, 2}:
        raise ValueError(f"strides={tuple(strides)}: give 1 or 2 for every stage")
    for letter in "".join(layout):
        if letter not in blocks:
            raise validation.unknown(f'block in layout "{_show(layout)}":', letter, blocks)
    stages = zip(layout, depths, widths, strides, strict=True)
    return tuple(Stage(_repeat(p, depth), width, stride) for p, depth, width, stride in stages)


def _show(layout: str | Sequence[str]) -> str:
    return layout if isinstance(layout, str) else ",".join(layout)


def _repeat(pattern: str, depth: int) -> str:
    if not pattern or depth % len(pattern):
        raise ValueError(
            f'stage "{pattern}" of {len(pattern)} blocks cannot fill depth {depth}: '
            "give a pattern whose length divides the depth, or all letters"
        )
    return pattern * (depth // len(pattern))


def drop_path_rates(stages: Sequence[Stage], rate: float) -> list[tuple[float, ...]]:
    """Stochastic depth growing linearly over all blocks, from 0 to `rate` (arXiv 1603.09382)."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path={rate}: give a probability, at least 0 and below 1")
    depths = [len(stage.letters) for stage in stages]
    rates = np.linspace(0.0, rate, sum(depths))
    return [tuple(map(float, part)) for part in np.split(rates, np.cumsum(depths)[:-1])]


class BlockStage(nn.Module):
    """One stage: its blocks in sequence, the first of which may change width and resolution.

    Attributes:
      options: fields per block, one mapping for each letter of the stage.
      drop_path: stochastic depth per block.
      downsample: module that takes the stride and the change of width away from the first block.
    """

    stage: Stage
    options: tuple[Mapping[str, Any], ...]
    drop_path: tuple[float, ...]
    dtype: str = "float32"
    downsample: nn.Module | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b i j e"]:
        stride = self.stage.stride
        if self.downsample is not None:
            x, stride = self.downsample(x, train=train), 1
        blocks = [
            BLOCKS[letter](
                features=self.stage.width,
                stride=stride if i == 0 else 1,
                drop_path=self.drop_path[i],
                dtype=self.dtype,
                name=f"block{i + 1}",
                **self.options[i],
            )
            for i, letter in enumerate(self.stage.letters)
        ]

        def call(block: nn.Module, x: Array, extra: None) -> Array:
            del extra
            return block(x, train=train)

        return apply_blocks(self, blocks, x, call, [None] * len(blocks))[-1]


def hashable(blocks: Mapping[str, Any]) -> FrozenDict:
    """Returns the options of blocks without dicts and lists.

    Hashable fields make a hashable module, which can be a static argument of jit.
    """
    return freeze(values.tuples(dict(blocks)))


def odd_grids(letter: str, options: Options) -> Rounding:
    """Returns the rounding of a block with stride 2 on an odd grid; None: no rounding."""
    block = BLOCKS[letter](features=1, parent=None, **options.get(letter, {}))
    return getattr(block, "odd_grids", None)


def check_options(
    options: Options,
    blocks: Mapping[str, type[nn.Module]] = BLOCKS,
    reserved: Collection[str] = ("features", "stride", "drop_path", "dtype"),
) -> None:
    """Raises ValueError for letters and fields that no block has, and for wrong types.

    `reserved`: the fields that the model itself sets in every block.
    """
    for letter, fields in options.items():
        if letter not in blocks:
            raise validation.unknown("block letter in blocks:", letter, blocks)
        for field in reserved:
            if field in fields:
                raise ValueError(f"blocks: {field} of block {letter} is set by the model: omit it")
        validation.check_fields(blocks[letter], fields, f"block {letter}")
