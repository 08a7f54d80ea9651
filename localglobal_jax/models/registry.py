# SPDX-License-Identifier: Apache-2.0
"""The named models: creates, lists and describes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, overload

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
    """Returns the name and fields, as plain data, from which `create_model` rebuilds `module`.

    >>> fields = lg.models.describe(lg.create_model("coatnet_0", classes=10))
    >>> fields["name"], fields["classes"], fields["depths"]
    ('coatnet', 10, (2, 3, 5, 2))
    >>> lg.create_model(**fields) == lg.create_model("coatnet_0", classes=10)
    True
    """
    names = [name for name, (cls, _) in MODELS.items() if cls is type(module)]
    if not names:
        known = ", ".join(sorted({cls.__name__ for cls, _ in MODELS.values()}))
        raise ValueError(f"{type(module).__name__} is not a model of `create_model`: give {known}")
    fields = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    return {"name": names[0], **{f: _plain(getattr(module, f)) for f in sorted(fields)}}


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def image_channels(variables: Variables) -> int:
    """Returns the channels of the images that a model of images takes."""
    # the first convolution of every stem here: [height, width, channels, features]
    stem = jax.tree.leaves(variables["params"]["stem"])
    return int(next(leaf.shape[2] for leaf in stem if leaf.ndim == 4))


def list_models() -> list[str]:
    """Returns the names that `create_model` accepts, sorted.

    >>> [name for name in lg.list_models() if name.startswith("focal_")][:2]
    ['focal_base', 'focal_base_useconv']
    """
    return sorted(MODELS)


def named_models() -> list[str]:
    """Returns the names of the models of a definite size, without the bare classes.

    >>> {"coatnet", "coatnet_0"} & set(lg.models.named_models())
    {'coatnet_0'}
    """
    return [name for name, (_, spec) in sorted(MODELS.items()) if spec or name in FIGURES]


def example(name: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns inputs (batch 1) at the size where a model is counted: image, or two sentences.

    >>> lg.models.example("coatnet_0")
    (ShapeDtypeStruct(shape=(1, 224, 224, 3), dtype=float32),)
    """
    if name not in MODELS:
        raise validation.unknown("model", name, MODELS)
    if issubclass(MODELS[name][0], EncoderDecoder):
        return tuple(jax.ShapeDtypeStruct((1, length), "int32") for length in LENGTHS)
    _, _, size = FIGURES.get(name, (None, None, 224))
    return (jax.ShapeDtypeStruct((1, size, size, 3), "float32"),)


@overload
def create_model(name: Literal["coatnet"], **overrides: Any) -> CoAtNet: ...
@overload
def create_model(name: Literal["volo"], **overrides: Any) -> VOLO: ...
@overload
def create_model(name: Literal["focal"], **overrides: Any) -> FocalTransformer: ...
@overload
def create_model(name: Literal["muse"], **overrides: Any) -> EncoderDecoder: ...
@overload
def create_model(name: str, **overrides: Any) -> nn.Module: ...
def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds the linen module called `name`, with some of its fields overridden.

    Raises ValueError for a name or a field that does not exist, or a value of another type.

    >>> module = lg.create_model("coatnet_0", classes=10)
    >>> images = jnp.ones((1, 224, 224, 3))
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), images)  # `module.init` computes
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    24275510
    >>> lg.create_model("coatnet_00")
    Traceback (most recent call last):
    ValueError: ...
    """
    if name not in MODELS:
        raise validation.unknown("model", name, MODELS)
    cls, spec = MODELS[name]
    validation.check_fields(cls, overrides, f'model "{name}"')
    depths = overrides.get("depths", ())
    if sum(depths) > DEEPEST:
        raise ValueError(f'model "{name}": depths={depths}: at most {DEEPEST} blocks altogether')
    return cls(**{**spec, **overrides})
