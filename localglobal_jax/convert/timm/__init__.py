# SPDX-License-Identifier: Apache-2.0
"""Converts weights of timm (pytorch-image-models). One file per model family.

A family is a function ``load(name_or_cfg, state_dict, **model_kwargs) -> (module, variables)``.

>>> lg.convert.timm.load("coatnet_0_rw_224", {})  # an empty state dict
Traceback (most recent call last):
ValueError: ...
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from localglobal_jax.config import validation
from localglobal_jax.convert.timm import coatnet, volo
from localglobal_jax.convert.weights import Variables

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
