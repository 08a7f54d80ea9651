# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST under its standard TFDS name, version and features, without TensorFlow.

What TFDS ships needs TensorFlow to encode its PNGs, and checks sums of the upstream archives, which
Debian compressed anew. This subclass reads the same IDX files from a directory, or lets TFDS
download them, and encodes with OpenCV. It stays out of TFDS's registry, where the name is taken.
"""

import gzip
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from tensorflow_datasets.core import registered

# Imported before the registry is switched off below, or TFDS would lose all its own image sets.
from tensorflow_datasets.image_classification import mnist

INSTALLED = pathlib.PurePosixPath("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
COUNTS = {"train": 60_000, "test": 10_000}
LARGEST = 16 + 28 * 28 * COUNTS["train"]  # bytes of a file


def packages(config: str = "") -> list[str]:
    """Returns the Debian and Ubuntu package of the files."""
    del config  # there is one
    return ["dataset-fashion-mnist"]


def locate(
    directory: str | pathlib.Path, config: str = ""
) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Returns the four IDX files (gzipped or not) in ``directory``: split -> (images, labels)."""
    del config
    found, missing = {}, []
    for split, stems in FILES.items():
        paths = []
        for stem in stems:
            options = [pathlib.Path(directory) / f"{stem}{end}" for end in (".gz", "")]
            paths += [path for path in options if path.is_file()][:1]
            missing += [] if any(path.is_file() for path in options) else [stem]
        found[split] = tuple(paths)
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"Fashion-MNIST in {directory}: missing {names} (.gz or not)")
    return found  # type: ignore[return-value]


def read_idx(path: pathlib.Path, count: int) -> np.ndarray:
    """Returns an IDX file of bytes (gzipped or not) as ``uint8 [count, ...]``.

    The format (LeCun's MNIST page): two zero bytes, a type code (8: unsigned byte), the number of
    dimensions, then each dimension as a big-endian 32-bit integer, then the values.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(LARGEST + 1)  # no more, whatever it may unpack to
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rank = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    header = 4 + 4 * rank
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    values = np.frombuffer(data[header:], np.uint8)
    if rank == 0 or shape[0] != count or values.size != math.prod(shape):
        raise ValueError(
            f"{path}: not an IDX file of {count} items (its header says {shape}, "
            f"{values.size} bytes follow)"
        )
    return values.reshape(shape)


with registered.skip_registration():

    class FashionMNIST(mnist.FashionMNIST):
        """``source``: a directory with the four IDX files; None: TFDS downloads them."""

        def __init__(self, *, source: str | None = None, **kwargs: Any):
            self.source = source
            super().__init__(**kwargs)

        def _split_generators(self, dl_manager: Any) -> Any:
            if self.source is None:
                return super()._split_generators(dl_manager)
            files = locate(self.source)
            return {
                split: self._generate_examples(COUNTS[split], *files[split]) for split in COUNTS
            }

        def _generate_examples(
            self, num_examples: int, data_path: Any, label_path: Any
        ) -> Iterator[tuple[int, dict]]:
            images = read_idx(pathlib.Path(data_path), num_examples)
            labels = read_idx(pathlib.Path(label_path), num_examples)
            for i in range(num_examples):
                png = cv2.imencode(".png", images[i])[1].tobytes()
                yield i, {"image": png, "label": int(labels[i])}
