# SPDX-License-Identifier: Apache-2.0
"""The grammar: an operator plus residual wiring, norm, MLP. One letter each.

Every block is a module with the fields `features` (output width), `stride` (1 or 2), `drop_path`
(rate) and `dtype`, and is called as ``block(x, train=...)`` on a grid [b, h, w, d].
"""

from typing import TYPE_CHECKING

import flax.linen as nn

from localglobal_jax.blocks.convolution import ConvNeXtBlock, MBConvBlock
from localglobal_jax.blocks.transformer import (
    AdaptiveConvBlock,
    AttentionBlock,
    EquivariantAttentionBlock,
    FocalAttentionBlock,
    MuseBlock,
    OutlookerBlock,
    RelativeAttentionBlock,
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
    "AdaptiveConvBlock",
    "AttentionBlock",
    "ConvNeXtBlock",
    "EquivariantAttentionBlock",
    "FocalAttentionBlock",
    "MBConvBlock",
    "MuseBlock",
    "OutlookerBlock",
    "RelativeAttentionBlock",
]


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
