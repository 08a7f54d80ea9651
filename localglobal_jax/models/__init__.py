# SPDX-License-Identifier: Apache-2.0
"""Models: CoAtNet, VOLO, Focal Transformer, encoder-decoders; each a layout of blocks."""

from localglobal_jax.models.coatnet import CoAtNet
from localglobal_jax.models.encoder_decoder import EncoderDecoder
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.models.registry import (
    FIGURES,
    MODELS,
    create_model,
    describe,
    example,
    list_models,
    named_models,
)
from localglobal_jax.models.volo import VOLO

__all__ = [
    "FIGURES",
    "MODELS",
    "VOLO",
    "CoAtNet",
    "EncoderDecoder",
    "FocalTransformer",
    "create_model",
    "describe",
    "example",
    "list_models",
    "named_models",
]
