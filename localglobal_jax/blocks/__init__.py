# SPDX-License-Identifier: Apache-2.0
"""Blocks: an operator with residual connection, norm and MLP. Each has one letter.

Every block over grids is a module with the fields `features` (output width), `stride` (1 or 2),
`drop_path` (rate) and `dtype`, and is called as ``block(x, train=...)`` on a grid [b, h, w, d].
`SEQUENCE_BLOCKS` are those over sequences, see `blocks.sequence`.

>>> "".join(sorted(lg.blocks.BLOCKS)), "".join(sorted(lg.blocks.SEQUENCE_BLOCKS))
('ACEFMNOST', 'ADEMST')
>>> block = lg.blocks.BLOCKS["T"](features=32, stride=2, head_width=8)
>>> x = jnp.ones((2, 8, 8, 16))
>>> jax.eval_shape(block.init_with_output, jax.random.key(0), x)[0].shape
(2, 4, 4, 32)
"""

from typing import TYPE_CHECKING, Literal, overload

from localglobal_jax.blocks.convolution import ConvNeXtBlock, MBConvBlock
from localglobal_jax.blocks.layers import (
    MLP,
    DropPath,
    LayerScale,
    Shortcut,
    SqueezeExcite,
    make_divisible,
    make_norm,
    norm_activation,
    pool,
)
from localglobal_jax.blocks.sequence import (
    SEQUENCE_BLOCKS,
    AdaptiveLayer,
    DynamicConvLayer,
    EquivariantLayer,
    MuseLayer,
    RelativeLayer,
    TransformerLayer,
)
from localglobal_jax.blocks.transformer import (
    AdaptiveConvBlock,
    AttentionBlock,
    EquivariantAttentionBlock,
    FocalAttentionBlock,
    MuseBlock,
    OutlookerBlock,
    RelativeAttentionBlock,
    TransformerBlock,
)
from localglobal_jax.config import renamed

Block = MBConvBlock | ConvNeXtBlock | TransformerBlock | OutlookerBlock | MuseBlock


class _Blocks(dict[str, type[Block]]):
    """Gives type checkers the class of a letter, and so its fields."""

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, letter: Literal["A"], /) -> type[AdaptiveConvBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["C"], /) -> type[MBConvBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["E"], /) -> type[EquivariantAttentionBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["F"], /) -> type[FocalAttentionBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["M"], /) -> type[MuseBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["N"], /) -> type[ConvNeXtBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["O"], /) -> type[OutlookerBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["S"], /) -> type[AttentionBlock]: ...
        @overload
        def __getitem__(self, letter: Literal["T"], /) -> type[RelativeAttentionBlock]: ...
        @overload
        def __getitem__(self, letter: str, /) -> type[Block]: ...
        def __getitem__(self, letter: str, /) -> type[Block]: ...


BLOCKS = _Blocks(
    A=AdaptiveConvBlock,
    C=MBConvBlock,
    E=EquivariantAttentionBlock,
    F=FocalAttentionBlock,
    M=MuseBlock,
    N=ConvNeXtBlock,
    O=OutlookerBlock,
    S=AttentionBlock,
    T=RelativeAttentionBlock,
)

__all__ = [
    "BLOCKS",
    "MLP",
    "SEQUENCE_BLOCKS",
    "AdaptiveConvBlock",
    "AdaptiveLayer",
    "AttentionBlock",
    "ConvNeXtBlock",
    "DropPath",
    "DynamicConvLayer",
    "EquivariantAttentionBlock",
    "EquivariantLayer",
    "FocalAttentionBlock",
    "LayerScale",
    "MBConvBlock",
    "MuseBlock",
    "MuseLayer",
    "OutlookerBlock",
    "RelativeAttentionBlock",
    "RelativeLayer",
    "Shortcut",
    "SqueezeExcite",
    "TransformerBlock",
    "TransformerLayer",
    "make_divisible",
    "make_norm",
    "norm_activation",
    "pool",
]


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
