# SPDX-License-Identifier: Apache-2.0
"""Every model by name. A name is a class and the fields that the paper's table gives it."""

import dataclasses
from typing import Any

import flax.linen as nn

from localglobal_jax import configlib
from localglobal_jax.models import coatnet, focal, muse, volo
from localglobal_jax.models.coatnet import CoAtNet
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.models.muse import EncoderDecoder
from localglobal_jax.models.volo import VOLO

MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "coatnet": (CoAtNet, {}),
    **{name: (CoAtNet, spec) for name, spec in coatnet.VARIANTS.items()},
    "volo": (VOLO, {}),
    **{name: (VOLO, spec) for name, spec in volo.VARIANTS.items()},
    "muse": (EncoderDecoder, {}),
    **{name: (EncoderDecoder, spec) for name, spec in muse.VARIANTS.items()},
    "focal": (FocalTransformer, {}),
    **{name: (FocalTransformer, spec) for name, spec in focal.VARIANTS.items()},
}

__all__ = [
    "MODELS",
    "VOLO",
    "CoAtNet",
    "EncoderDecoder",
    "FocalTransformer",
    "create_model",
    "list_models",
]


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The linen module called `name`, with some of its fields overridden.

    Raises ValueError for a name or a field that does not exist.
    """
    if name not in MODELS:
        raise configlib.unknown("model", name, MODELS)
    cls, spec = MODELS[name]
    fields = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    for field in overrides:
        if field not in fields:
            raise configlib.unknown(f'option of model "{name}":', field, fields)
    return cls(**{**spec, **overrides})
