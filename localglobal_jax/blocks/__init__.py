# SPDX-License-Identifier: Apache-2.0
"""The grammar: an operator plus residual wiring, norm, MLP. One letter each.

Every block is a module with the fields `features` (output width), `stride` (1 or 2), `drop_path`
(rate) and `dtype`, and is called as ``block(x, train=...)`` on a grid [b, h, w, d].
"""

import flax.linen as nn

from localglobal_jax.blocks.convnext import ConvNeXt
from localglobal_jax.blocks.convolution import MBConv
from localglobal_jax.blocks.muse import MuseBlock
from localglobal_jax.blocks.outlooker import Outlooker
from localglobal_jax.blocks.transformer import (
    AdaptiveTransformer,
    EquivariantTransformer,
    FocalTransformerBlock,
    PlainTransformer,
    Transformer,
)

BLOCKS: dict[str, type[nn.Module]] = {
    "A": AdaptiveTransformer,
    "C": MBConv,
    "E": EquivariantTransformer,
    "F": FocalTransformerBlock,
    "M": MuseBlock,
    "N": ConvNeXt,
    "O": Outlooker,
    "S": PlainTransformer,
    "T": Transformer,
}

__all__ = [
    "BLOCKS",
    "AdaptiveTransformer",
    "ConvNeXt",
    "EquivariantTransformer",
    "FocalTransformerBlock",
    "MBConv",
    "MuseBlock",
    "Outlooker",
    "PlainTransformer",
    "Transformer",
]
