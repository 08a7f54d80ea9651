# SPDX-License-Identifier: Apache-2.0
"""Models: CoAtNet, VOLO, Focal Transformer, encoder-decoders; each a layout of blocks.

>>> module_class, fields = lg.models.MODELS["coatnet_0"]
>>> module_class.__name__, fields["depths"]
('CoAtNet', (2, 3, 5, 2))
>>> parameters, multiply_adds, image_size = lg.models.FIGURES["coatnet_0"]  # as in the paper
>>> parameters, multiply_adds, image_size
(25000000.0, 4200000000.0, 224)
"""

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
