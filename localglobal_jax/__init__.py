# SPDX-License-Identifier: Apache-2.0
"""The JAX/Flax home of models that join convolution (local) and self-attention (global).

    import localglobal_jax as lg

    module = lg.create_model("coatnet_0", classes=10)          # a flax.linen module
    variables = module.init(key, images, train=False)          # images: [b, h, w, channels]
    logits, intermediates = module.apply(variables, images, train=False)
    module, variables = lg.load("runs/digits")                 # from our checkpoints

Everything is imported when it is first used, so that this import costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from localglobal_jax import (
        accounting,
        blocks,
        classify,
        convert,
        decoding,
        grad_cam,
        layout,
        models,
        operators,
        step_context,
        translate,
    )
    from localglobal_jax.evaluate import load
    from localglobal_jax.models import create_model, list_models

__all__ = [
    "accounting",
    "blocks",
    "classify",
    "convert",
    "create_model",
    "decoding",
    "grad_cam",
    "layout",
    "list_models",
    "load",
    "models",
    "operators",
    "step_context",
    "translate",
]

_FROM = {"create_model": "models", "list_models": "models", "load": "evaluate"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module localglobal_jax has no attribute {name!r}")
    module = importlib.import_module(f"localglobal_jax.{_FROM.get(name, name)}")
    return getattr(module, name) if name in _FROM else module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
