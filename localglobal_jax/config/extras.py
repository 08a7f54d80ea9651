# SPDX-License-Identifier: Apache-2.0
"""The extra `train`: packages that the command line and training need, and modules do not."""

import importlib.util

# top-level modules of the packages that setup.py lists in `TRAIN` and flax does not bring
TRAIN = (
    "PIL",
    "array_record",
    "cv2",
    "google_crc32c",
    "grain",
    "importlib_resources",
    "jinja2",
    "matplotlib",
    "sacrebleu",
    "sentencepiece",
    "shtab",
    "simplejpeg",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
)


class MissingExtra(ImportError):
    """Packages of the extra `train` are not installed; the message has the command for it."""

    def __init__(self, purpose: str, modules: list[str]):
        super().__init__(
            f"{purpose} needs packages that are not installed ({', '.join(modules)}): "
            "pip install 'localglobal_jax[train]'",
            name=modules[0],
        )


def check(purpose: str) -> None:
    """Raises MissingExtra, with every missing module, unless the extra `train` is installed."""
    if missing := [name for name in TRAIN if importlib.util.find_spec(name) is None]:
        raise MissingExtra(purpose, missing)
