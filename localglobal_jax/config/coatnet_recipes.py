# SPDX-License-Identifier: Apache-2.0
"""The hyper-parameters of CoAtNet (arXiv 2106.04803, table 10), for the configs. Imports no jax.

In all columns: AdamW, the gradient clipped to a norm of 1, and at least 1e-5 as learning rate.
"""

from collections.abc import Mapping
from typing import Any

# Pre-training: one value, or one for each variant. Label smoothing is spread over all classes, also
# under the sigmoid loss, for which the paper does not say how. JFT is not public: its column is for
# other sets of that size. Not compared with the paper's page, for lack of a copy: the column "jft",
# and epochs and RandAugment of "21k".
PRETRAINING: dict[str, dict[str, Any]] = {
    "1k": {
        "drop_path": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
        "randaugment": (2, 15),
        "mixup": 0.8,
        "loss": "softmax",
        "label_smoothing": 0.1,
        "epochs": 300,
        "learning_rate": 1e-3,
        "warmup_steps": 10_000,
        "schedule": "cosine",
        "weight_decay": 0.05,
    },
    "21k": {
        "drop_path": {2: 0.3, 3: 0.5, 4: 0.7},
        "randaugment": (0, 5),  # none; two layers in the rows "PT-RA"
        "mixup": 0.0,
        "loss": "sigmoid",
        "label_smoothing": 1e-4,
        "epochs": 90,
        "learning_rate": 1e-3,
        "warmup_epochs": 5,
        "schedule": "linear",
        "weight_decay": 0.01,
    },
    "jft": {
        "drop_path": {3: 0.0, 4: 0.1, 5: 0.0},
        "randaugment": (2, 5),
        "mixup": 0.0,
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "epochs": 14,
        "learning_rate": {3: 1e-3, 4: 5e-4, 5: 5e-4},
        "warmup_steps": 20_000,
        "schedule": "linear",
        "weight_decay": 0.01,
    },
}

# Fine-tuning for 30 epochs at a constant 5e-5, weight decay 1e-8, an average of 0.9999, softmax and
# label smoothing 0.1, by the set of the pre-training ("1k": the same images at another resolution).
# RandAugment has two layers; its magnitude is that of the column, or of the variant.
FINETUNING: dict[str, dict[str, Any]] = {
    "1k": {
        "drop_path": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
        "magnitude": 15,
        "randaugment": {3: 20},
        "mixup": 0.8,
        "batch_size": 512,
    },
    "21k": {
        "drop_path": {2: 0.3, 3: 0.5, 4: 0.7},
        "magnitude": 5,
        "randaugment": {},
        "mixup": 0.0,
        "batch_size": 1024,
    },
    "jft": {
        "drop_path": {3: 0.1, 4: 0.3, 5: 0.2},
        "magnitude": 5,
        "randaugment": {},
        "mixup": 0.0,
        "batch_size": 512,
    },
}

# Depths and widths by number, of a checkpoint whose model has no name
SIZES = {
    0: ((2, 3, 5, 2), (96, 192, 384, 768)),
    1: ((2, 6, 14, 2), (96, 192, 384, 768)),
    2: ((2, 6, 14, 2), (128, 256, 512, 1024)),
    3: ((2, 6, 14, 2), (192, 384, 768, 1536)),
    4: ((2, 12, 28, 2), (192, 384, 768, 1536)),
    5: ((2, 12, 28, 2), (256, 512, 1280, 2048)),
}


def size_of(model: Mapping[str, Any]) -> int | None:
    """Returns the number of the paper's CoAtNet that a ``model`` section describes, or None.

    Models of timm have other depths or widths, or blocks of their own; they have no number.
    """
    number = model["name"].removeprefix("coatnet_")
    if number.isdigit():
        return int(number)
    found = tuple(model.get("depths", ())), tuple(model.get("widths", ()))
    return next((size for size, known in SIZES.items() if known == found), None)
