# SPDX-License-Identifier: Apache-2.0
"""JAX and Flax models that join convolution (local) and self-attention (global).

Training from Python, here on eight-by-eight images of digits:

>>> import localglobal_jax as lg
>>> config = lg.load_config("configs/coatnet_digits.py:size=tiny", data=dict(mock=True))
>>> metrics = lg.train(config, "runs/digits")
>>> step, metrics = lg.evaluate("runs/digits")
>>> module, variables = lg.load("runs/digits")  # a flax.linen module
>>> step, type(module).__name__, sorted(variables)
(20, 'CoAtNet', ['batch_stats', 'params'])

Models without a run:

>>> module = lg.create_model("coatnet", layout="T", depths=(1,), widths=(32,), classes=10)
>>> images = jnp.ones((1, 8, 8, 3))  # [b, h, w, channels]
>>> variables = module.init(jax.random.key(0), images, train=False)
>>> logits, intermediates = module.apply(variables, images, train=False)
>>> logits.shape
(1, 10)

In all examples `jax`, `jnp` (jax.numpy), `np` (numpy), `nn` (flax.linen) and `lg` are imported.
Many of them compute shapes alone, by `jax.eval_shape`. Public are the names of ``__all__``, here
and in `localglobal_jax.operators`, `localglobal_jax.blocks`, `localglobal_jax.models`,
`localglobal_jax.inference.decoding` (``lg.decoding``), `localglobal_jax.convert`,
`localglobal_jax.config`, `localglobal_jax.data`, `localglobal_jax.parallel` and
`localglobal_jax.training`. The version:

>>> lg.__version__.count(".")
2

Every name is imported when it is first used: ``import localglobal_jax`` does not import jax.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from localglobal_jax.config import extras, renamed

__version__ = "0.1.0"

# OpenCV reads this once, when it is imported. 300 MB an image, in each decoding thread.
if "cv2" not in sys.modules:
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "100000000")

if TYPE_CHECKING:
    from localglobal_jax import (
        blocks,
        config,
        convert,
        data,
        models,
        operators,
        parallel,
        training,
    )
    from localglobal_jax.config.loading import load_config
    from localglobal_jax.inference import decoding
    from localglobal_jax.inference.classifier import load as load_classifier
    from localglobal_jax.inference.load import load
    from localglobal_jax.inference.translator import load as load_translator
    from localglobal_jax.models.registry import create_model, list_models
    from localglobal_jax.parallel.context import implementation
    from localglobal_jax.training.evaluation import evaluate
    from localglobal_jax.training.loop import train

__all__ = [
    "__version__",
    "blocks",
    "config",
    "convert",
    "create_model",
    "data",
    "decoding",
    "evaluate",
    "implementation",
    "list_models",
    "load",
    "load_classifier",
    "load_config",
    "load_translator",
    "models",
    "operators",
    "parallel",
    "train",
    "training",
]

_FUNCTIONS = {
    "create_model": "models.registry:create_model",
    "evaluate": "training.evaluation:evaluate",
    "implementation": "parallel.context:implementation",
    "list_models": "models.registry:list_models",
    "load": "inference.load:load",
    "load_classifier": "inference.classifier:load",
    "load_config": "config.loading:load_config",
    "load_translator": "inference.translator:load",
    "train": "training.loop:train",
}

renamed.install()


if not TYPE_CHECKING:  # to a type checker every other name is an error

    def __getattr__(name: str) -> Any:
        module, _, function = _FUNCTIONS.get(name, name).partition(":")
        if name not in __all__ and name not in renamed.MODULES:
            raise AttributeError(f"module localglobal_jax has no attribute {name!r}")
        try:
            imported = importlib.import_module(f"localglobal_jax.{module}")
        except ModuleNotFoundError as error:
            if error.name in extras.TRAIN:
                extras.check(f"localglobal_jax.{name}")
            raise
        return getattr(imported, function) if function else imported


def __dir__() -> list[str]:
    return sorted(__all__)
