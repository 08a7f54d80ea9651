# SPDX-License-Identifier: Apache-2.0
"""The named models: creates, lists and describes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from localglobal_jax.config import validation
from localglobal_jax.models import coatnet, coatnet_variants, encoder_decoder, focal, volo
from localglobal_jax.models.coatnet import CoAtNet
from localglobal_jax.models.encoder_decoder import EncoderDecoder
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.models.volo import VOLO

Variables = Mapping[str, PyTree]  # collection -> tree: "params", "batch_stats"

MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "coatnet": (CoAtNet, {}),
    **{name: (CoAtNet, spec) for name, spec in coatnet.VARIANTS.items()},
    "volo": (VOLO, {}),
    **{name: (VOLO, spec) for name, spec in volo.VARIANTS.items()},
    "muse": (EncoderDecoder, {}),
    **{name: (EncoderDecoder, spec) for name, spec in encoder_decoder.VARIANTS.items()},
    "focal": (FocalTransformer, {}),
    **{name: (FocalTransformer, spec) for name, spec in focal.VARIANTS.items()},
}

DEEPEST = 1000  # blocks; far beyond any published model
LENGTHS = (32, 32)  # of source and target, where sequence models are counted
# What the papers print: parameters, multiply-adds (None: not given), image size (None: tokens).
FIGURES: dict[str, tuple[float, float | None, int | None]] = {
    **coatnet_variants.FIGURES,
    **volo.FIGURES,
    **focal.FIGURES,
    **encoder_decoder.FIGURES,
}


def describe(module: nn.Module) -> dict[str, Any]:
    """Returns the name and fields, as plain data, from which `create_model` rebuilds `module`."""
    name = next(name for name, (cls, _) in MODELS.items() if cls is type(module))  # the bare one
    fields = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    return {"name": name, **{f: _plain(getattr(module, f)) for f in sorted(fields)}}


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def image_channels(variables: Variables) -> int:
    """Returns the channels of the images that a model of images takes."""
    # the first convolution of every stem here: [height, width, channels, features]
    stem = jax.tree.leaves(variables["params"]["stem"])
    return int(next(leaf.shape[2] for leaf in stem if leaf.ndim == 4))


def list_models() -> list[str]:
    """Returns the names that `create_model` accepts, sorted."""
    return sorted(MODELS)


def named_models() -> list[str]:
    """Returns the names of the models of a definite size, without the bare classes."""
    return [name for name, (_, spec) in sorted(MODELS.items()) if spec or name in FIGURES]


def example(name: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns inputs (batch 1) at the size where a model is counted: image, or two sentences."""
    if issubclass(MODELS[name][0], EncoderDecoder):
        return tuple(jax.ShapeDtypeStruct((1, length), "int32") for length in LENGTHS)
    _, _, size = FIGURES.get(name, (None, None, 224))
    return (jax.ShapeDtypeStruct((1, size, size, 3), "float32"),)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds the linen module called `name`, with some of its fields overridden.

    Raises ValueError for a name or a field that does not exist, or a value of another type.
    """
    if name not in MODELS:
        raise validation.unknown("model", name, MODELS)
    cls, spec = MODELS[name]
    validation.check_fields(cls, overrides, f'model "{name}"')
    depths = overrides.get("depths", ())
    if sum(depths) > DEEPEST:
        raise ValueError(f'model "{name}": depths={depths}: at most {DEEPEST} blocks altogether')
    return cls(**{**spec, **overrides})
