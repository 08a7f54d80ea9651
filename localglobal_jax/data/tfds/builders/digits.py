# SPDX-License-Identifier: Apache-2.0
"""The 1,797 handwritten digits inside scikit-learn as a TFDS data set, split in two.

8x8 pixels, one channel, ten classes; the test set of UCI's "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998). It has no official split of its own, so the split here is part
of the data set's version: changing `SEED` or `EVERY` means a new version.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

SEED = 0
EVERY = 5  # each fifth image is a test image


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a seeded, stratified split: ``(train, test)`` indices into ``labels [n]``.

    Shuffled, then ordered by class, then every fifth: no class gets more than one image beyond
    its fair share, and the total is exact.
    """
    shuffled = np.random.default_rng(SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = by_class[::EVERY]
    return np.setdiff1d(by_class, test), np.sort(test)


class Digits(tfds.core.GeneratorBasedBuilder):
    """Registered in TFDS as ``digits`` once this module is imported."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS reads a plain dict)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8x8 handwritten digits that ship inside scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits  # noqa: PLC0415  (a second of import time)

        values, labels = load_digits(return_X_y=True)
        images = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
        train, test = split_indices(labels)
        return {
            "train": self._generate_examples(train, images, labels),
            "test": self._generate_examples(test, images, labels),
        }

    def _generate_examples(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        # PNG bytes, not arrays: TFDS encodes arrays with TensorFlow only.
        for i in indices.tolist():
            png = cv2.imencode(".png", images[i])[1].tobytes()
            yield i, {"image": png, "label": int(labels[i])}
