# SPDX-License-Identifier: Apache-2.0
"""Readers of single images: the records of a prepared TFDS split, or mock images.

A reader returns undecoded records in blocks and decodes each by itself, so that the decoding can be
spread over threads.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import tensorflow_datasets as tfds

from localglobal_jax.data.images import augment, headers
from localglobal_jax.data.tfds import records

log = logging.getLogger(__name__)

# OpenCV reads it once, when cv2 is imported. The package's __init__ sets it unless cv2 was first.
MAX_PIXELS = "OPENCV_IO_MAX_IMAGE_PIXELS"
if MAX_PIXELS not in os.environ:
    log.warning(
        "cv2 was imported before localglobal_jax: images of up to 2**30 pixels are decoded (3 GB "
        "each, in every thread). Import localglobal_jax first, or set %s",
        MAX_PIXELS,
    )

MOCK_TRAIN, MOCK_EVAL = 1024, 256  # examples


class Reader(Protocol):
    """Random access to undecoded records, and their decoding."""

    classes: int
    channels: int
    shape: tuple[int, int] | None  # (height, width) if all images share it

    def __len__(self) -> int: ...

    def block(self, indices: Sequence[int]) -> Sequence[Any]:
        """Returns undecoded records; an unreadable one as a `records.BadRecord`."""

    def decode(self, record: Any) -> tuple[np.ndarray, int]:
        """Returns ``(uint8 [h, w, channels], label)``; any exception marks a bad record."""

    def bad(self, index: int, why: Any) -> records.BadRecord: ...


def decode(data: bytes, channels: int) -> np.ndarray:
    """Returns an encoded image as ``uint8 [h, w, channels]``, red first; ``channels``: 1 or 3.

    Accepts the kinds that ImageNet holds: grey, palette, CMYK, 16 bits, an alpha channel (dropped);
    of an animation the first picture. Like TFDS it ignores EXIF orientation.

    Raises:
      ValueError: the file fails `headers.checked`, cannot be decoded, or has more pixels than the
        environment variable `MAX_PIXELS` allows.
    """
    kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    raw = np.frombuffer(headers.checked(data), np.uint8)
    try:
        image = cv2.imdecode(raw, kind | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        bound = f" ({MAX_PIXELS}={os.environ.get(MAX_PIXELS)})" if "MAX_IMAGE" in error.err else ""
        raise ValueError(f"the image cannot be decoded: {error.err}{bound}") from error
    if image is None:
        raise ValueError("the image cannot be decoded")
    if channels == 1:
        return image[:, :, None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def label_and_image(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the names of the label and the image feature of a classification data set.

    Raises ValueError unless there is exactly one of each.
    """
    features = info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for key in info.supervised_keys or ():
        images = [key] if key in images else images
        labels = [key] if key in labels else labels
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{info.full_name} is not a set of images with one class label each: its "
            f"features are {', '.join(features)}"
        )
    return labels[0], images[0]


def facts(info: tfds.core.DatasetInfo) -> tuple[int, int, tuple[int, int] | None]:
    """Returns classes, channels and, if all images share it, (height, width)."""
    label, image = label_and_image(info)
    h, w, channels = info.features[image].shape
    channels = channels or 3  # where undeclared, decode to colour
    if channels not in (1, 3):
        raise ValueError(f"{info.full_name} has images of {channels} channels, want 1 or 3")
    return info.features[label].num_classes, channels, (h, w) if h and w else None


class RecordReader:
    """Records of a prepared TFDS split."""

    def __init__(self, source: records.Records):
        self._source = source
        self._label, self._image = label_and_image(source.info)
        self.classes, self.channels, self.shape = facts(source.info)
        self.bad = source.bad
        self.block = source.block

    def __len__(self) -> int:
        return len(self._source)

    def decode(self, record: Any) -> tuple[np.ndarray, int]:
        image = record[self._image]
        if not isinstance(image, np.ndarray):  # TFDS's mock data comes decoded
            if not isinstance(image, bytes):
                raise TypeError(f"its image is of type {type(image).__name__}, want bytes")
            image = decode(image, self.channels)
        if self.shape and image.shape[:2] != self.shape:
            raise ValueError(f"the image is {image.shape[:2]}, all should be {self.shape}")
        label = np.asarray(record[self._label])
        if label.size != 1 or label.dtype.kind not in "iub":  # int() would make 2 of 2.7
            raise TypeError(f"its label is {record[self._label]!r}, want a whole number")
        return image, int(label.item())


class MockReader:
    """Mock images: each class is a pattern of soft blobs, each image adds its own noise."""

    def __init__(self, classes: int, channels: int, size: tuple[int, int], train: bool):
        self.classes, self.channels = classes, channels
        self.shape: tuple[int, int] | None = size
        self._size = size
        self._train = train

    def __len__(self) -> int:
        return MOCK_TRAIN if self._train else MOCK_EVAL

    def block(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def decode(self, record: int) -> tuple[np.ndarray, int]:
        label = record % self.classes
        pattern = np.random.default_rng([label]).integers(0, 192, (4, 4, self.channels), np.uint8)
        image = augment.resize(pattern, self._size)
        noise = np.random.default_rng([record, self._train]).integers(0, 64, image.shape, np.uint8)
        return cv2.add(image, noise).reshape(image.shape), label

    def bad(self, index: int, why: Any) -> records.BadRecord:
        return records.BadRecord(f"mock record {index}: {why}")
