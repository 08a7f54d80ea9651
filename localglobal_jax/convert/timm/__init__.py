# SPDX-License-Identifier: Apache-2.0
"""Converts weights of timm (pytorch-image-models). One file per model family.

A family is a function ``load(name_or_cfg, state_dict, **model_kwargs) -> (module, variables)``.

>>> lg.convert.timm.load("coatnet_0_rw_224", {})  # an empty state dict
Traceback (most recent call last):
ValueError: ...
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import numpy as np

from localglobal_jax.config import validation
from localglobal_jax.convert.timm import coatnet, volo
from localglobal_jax.convert.weights import Variables
from localglobal_jax.models import VOLO, CoAtNet
from localglobal_jax.models.registry import image_channels

FAMILIES: dict[str, Callable[..., tuple[nn.Module, Variables]]] = {
    "coatnet": coatnet.load,
    "coatnext": coatnet.load,
    "volo": volo.load,
}


def load(
    name_or_cfg: str | Mapping[str, Any], state_dict: Mapping[str, Any], **model_kwargs: Any
) -> tuple[nn.Module, Variables]:
    """Returns the module of a timm name or configuration, and its variables from `state_dict`.

    Args:
      name_or_cfg: a timm model name (``coatnet_0_rw_224``; a leading ``timm/`` and a trailing
        ``.tag`` do not matter); the fields of timm's CoAtNet configuration as a dict; or "volo".
      state_dict: name -> array.
      **model_kwargs: what the timm model was created with (``img_size``, ``num_classes``, ...).

    Raises:
      ValueError: an unknown name, an option that our module does not have, or a state dict that
        does not fit.
    """
    if not isinstance(name_or_cfg, str):
        return FAMILIES["coatnet"](name_or_cfg, state_dict, **model_kwargs)
    name = name_or_cfg.removeprefix("hf-hub:").removeprefix("timm/").split(".")[0]
    family = name.split("_")[0]
    if family not in FAMILIES:
        raise validation.unknown("timm model family", family, FAMILIES)
    return FAMILIES[family](name, state_dict, **model_kwargs)


def state_dict(module: nn.Module, variables: Variables) -> dict[str, np.ndarray]:
    """Returns timm's state dict of the variables of a CoAtNet or VOLO: the inverse of `load`.

    Names, shapes and bits are those of timm; ``num_batches_tracked``, which nothing reads, is 0.
    Raises ValueError for other modules.
    """
    return _family(module).state_dict(module, variables)


def describe(
    module: nn.Module, variables: Variables, size: tuple[int, int]
) -> tuple[str, dict[str, Any]]:
    """Returns timm's name of a module, and the arguments of ``timm.create_model`` beside it.

    Raises ValueError for a module that timm does not have.
    """
    base = _family(module).name_of(module)
    if base is None:
        raise ValueError(
            f"timm has no {type(module).__name__} with these fields; it has "
            f"{', '.join([*coatnet.names(), *volo.names()])}"
        )
    given = {"num_classes": module.classes, "img_size": size}
    given["in_chans"] = image_channels(variables)
    usual = {"num_classes": 1000, "img_size": (224, 224), "in_chans": 3}
    if isinstance(module, VOLO):
        given["use_aux_head"], usual["use_aux_head"] = module.aux_head, bool(module.classes)
    return f"{base}_224", {k: v for k, v in given.items() if v != usual[k]}


def _family(module: nn.Module) -> ModuleType:
    families: dict[type, ModuleType] = {CoAtNet: coatnet, VOLO: volo}
    if type(module) not in families:
        raise ValueError(f"timm has no {type(module).__name__}: it has CoAtNet and VOLO")
    return families[type(module)]
