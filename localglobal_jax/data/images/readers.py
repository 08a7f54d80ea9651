# SPDX-License-Identifier: Apache-2.0
"""Readers of single images: the records of a prepared TFDS split, or mock images.

A reader returns undecoded records in blocks and decodes each by itself, so that the decoding can be
spread over threads.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import tensorflow_datasets as tfds

from localglobal_jax.data.images import augment, headers, jpeg, label_maps
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

# The same bound; where it is not a plain number OpenCV decodes the whole image.
_bound = os.environ.get(MAX_PIXELS, "")
PARTIAL_PIXELS = int(_bound) if _bound.isdecimal() else 0

MOCK_TRAIN, MOCK_EVAL = 1024, 256  # examples

Box = tuple[int, int, int, int]  # top, left, height, width
Part = Callable[[tuple[int, int]], Box]  # from an image's (height, width); called once


class Reader(Protocol):
    """Random access to undecoded records, and their decoding."""

    classes: int
    channels: int
    shape: tuple[int, int] | None  # (height, width) if all images share it

    def __len__(self) -> int: ...

    def block(self, indices: Sequence[int]) -> Sequence[Any]:
        """Returns undecoded records; an unreadable one as a `records.BadRecord`."""

    def decode(self, record: Any, part: Part | None = None) -> tuple[np.ndarray, int]:
        """Returns ``(uint8 [h, w, channels], label)``, of the image only ``part``, if given.

        Any exception marks a bad record.
        """

    def label(self, record: Any) -> int:
        """Returns the label of a record, whose image is not decoded."""

    def name(self, record: Any, index: int) -> str:
        """Returns the name of an image among the label maps, ``CLASS/STEM``."""

    def bad(self, index: int, why: Any) -> records.BadRecord: ...


def decode(data: bytes, channels: int, part: Part | None = None) -> np.ndarray:
    """Returns an encoded image as ``uint8 [h, w, channels]``, red first; ``channels``: 1 or 3.

    With ``part``, only that part of it; most JPEGs are then decoded no further than its last row.

    Accepts the kinds that ImageNet holds: grey, palette, CMYK, 16 bits, an alpha channel (dropped);
    of an animation the first picture. Like TFDS it ignores EXIF orientation.

    Raises:
      ValueError: the file fails `headers.checked`, cannot be decoded, or has more pixels than the
        environment variable `MAX_PIXELS` allows.
    """
    data = headers.checked(data)
    if part and channels == 3 and (frame := jpeg.find_frame(data)):
        size = frame.height, frame.width
        if math.prod(size) <= PARTIAL_PIXELS:
            box = part(size)
            with contextlib.suppress(ValueError):  # OpenCV decides about odd files
                return cut(jpeg.decode_rows(data, frame, box[0] + box[2]), box)
            return cut(_decode_all(data, channels), box)
    image = _decode_all(data, channels)
    return cut(image, part((image.shape[0], image.shape[1]))) if part else image


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """Returns a part of ``[h, w, c]``, a view."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _decode_all(data: bytes, channels: int) -> np.ndarray:
    kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    raw = np.frombuffer(data, np.uint8)
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

    def decode(self, record: Any, part: Part | None = None) -> tuple[np.ndarray, int]:
        image = record[self._image]
        if part:
            part = functools.partial(self._part, part)
        if isinstance(image, bytes):
            image = decode(image, self.channels, part)
        elif not isinstance(image, np.ndarray):  # TFDS's mock data comes decoded
            raise TypeError(f"its image is of type {type(image).__name__}, want bytes")
        elif part:
            image = cut(image, part((image.shape[0], image.shape[1])))
        if not part:
            self._check((image.shape[0], image.shape[1]))
        return image, self.label(record)

    def label(self, record: Any) -> int:
        label = np.asarray(record[self._label])
        if label.size != 1 or label.dtype.kind not in "iub":  # int() would make 2 of 2.7
            raise TypeError(f"its label is {record[self._label]!r}, want a whole number")
        return int(label.item())

    def name(self, record: Any, index: int) -> str:
        return label_maps.name_of(record)

    def _part(self, part: Part, shape: tuple[int, int]) -> Box:
        self._check(shape)
        return part(shape)

    def _check(self, shape: tuple[int, int]) -> None:
        if self.shape and shape != self.shape:
            raise ValueError(f"the image is {shape}, all should be {self.shape}")


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

    def decode(self, record: int, part: Part | None = None) -> tuple[np.ndarray, int]:
        label = self.label(record)
        pattern = np.random.default_rng([label]).integers(0, 192, (4, 4, self.channels), np.uint8)
        image = augment.resize(pattern, self._size)
        noise = np.random.default_rng([record, self._train]).integers(0, 64, image.shape, np.uint8)
        image = cv2.add(image, noise).reshape(image.shape)
        return cut(image, part(self._size)) if part else image, label

    def label(self, record: int) -> int:
        return record % self.classes

    def name(self, record: int, index: int) -> str:
        return f"{self.label(record)}/{record}"

    def bad(self, index: int, why: Any) -> records.BadRecord:
        return records.BadRecord(f"mock record {index}: {why}")
