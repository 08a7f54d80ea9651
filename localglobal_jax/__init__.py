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
    from localglobal_jax import blocks, convert, models, operators
    from localglobal_jax.inference import classifier as classify
    from localglobal_jax.inference import decoding, grad_cam
    from localglobal_jax.inference import translator as translate
    from localglobal_jax.inference.load import load
    from localglobal_jax.models import flops as accounting
    from localglobal_jax.models import layout
    from localglobal_jax.models.registry import create_model, list_models
    from localglobal_jax.parallel import context as step_context

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

_ATTRIBUTES = {"create_model": "models", "list_models": "models", "load": "training.evaluation"}
_MODULES = {
    "accounting": "models.flops",
    "classify": "inference.classifier",
    "decoding": "inference.decoding",
    "grad_cam": "inference.grad_cam",
    "layout": "models.layout",
    "step_context": "parallel.context",
    "translate": "inference.translator",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module localglobal_jax has no attribute {name!r}")
    place = _ATTRIBUTES.get(name) or _MODULES.get(name, name)
    module = importlib.import_module(f"localglobal_jax.{place}")
    return getattr(module, name) if name in _ATTRIBUTES else module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
