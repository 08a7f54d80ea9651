# SPDX-License-Identifier: Apache-2.0
"""Blocks: an operator with residual connection, norm and MLP. Each has one letter.

Every block over grids is a module with the fields `features` (output width), `stride` (1 or 2),
`drop_path` (rate) and `dtype`, and is called as ``block(x, train=...)`` on a grid [b, h, w, d].
`SEQUENCE_BLOCKS` are those over sequences, see `blocks.sequence`.
"""

from typing import TYPE_CHECKING

import flax.linen as nn

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

BLOCKS: dict[str, type[nn.Module]] = {
    "A": AdaptiveConvBlock,
    "C": MBConvBlock,
    "E": EquivariantAttentionBlock,
    "F": FocalAttentionBlock,
    "M": MuseBlock,
    "N": ConvNeXtBlock,
    "O": OutlookerBlock,
    "S": AttentionBlock,
    "T": RelativeAttentionBlock,
}

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
