# SPDX-License-Identifier: Apache-2.0
"""Readers of single images: the records of a prepared TFDS split, or mock images.

A reader returns undecoded records in blocks and decodes each by itself, so that the decoding can be
spread over threads.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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

# The same bound. OpenCV's own is 2**30.
_bound = os.environ.get(MAX_PIXELS, "")
ALLOWED_PIXELS = int(_bound) if _bound.isdecimal() else 2**30
ALLOWED_COEFFICIENTS = 6 * ALLOWED_PIXELS  # bytes: of so many pixels without subsampling

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


def decode(
    data: bytes, channels: int, part: Part | None = None, *, upright: bool = False
) -> np.ndarray:
    """Returns an encoded image as ``uint8 [h, w, channels]``, red first; ``channels``: 1 or 3.

    Accepts the kinds that ImageNet holds: grey, palette, CMYK, 16 bits, an alpha channel (dropped);
    of an animation the first picture. A JPEG of more pixels than the environment variable
    `MAX_PIXELS` allows is decoded at a half, a quarter or an eighth of its sides.

    Args:
      data: the file. Bytes after the end of its picture are not looked at.
      part: returns the part to decode; most JPEGs are decoded no further than its last row, so that
        damage below it is not found.
      upright: turn the image as its EXIF orientation says. TFDS, for one, leaves images as stored.

    Raises:
      ValueError: the file fails `headers.checked`, is cut short, cannot be decoded, or has more
        pixels than `MAX_PIXELS` allows.
    """
    found = headers.checked(data)
    turn = TURNS[found.orientation if upright else 1]
    box = part and functools.partial(_stored_box, part, turn)
    if found.structure:
        return _turned(_decode_jpeg(found.structure, channels, box), turn)
    image = _decode_all(found.data, channels)
    return _turned(cut(image, box((image.shape[0], image.shape[1]))) if box else image, turn)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """Returns a part of ``[h, w, c]``, a view."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


class Turn(NamedTuple):
    """Changes that make a stored image upright, in this order."""

    transpose: bool
    upside_down: bool
    mirror: bool


# By EXIF orientation: the side of the stored image where the first row and column are to be.
TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}


def _turned(image: np.ndarray, turn: Turn) -> np.ndarray:
    if not any(turn):
        return image
    if turn.transpose:
        image = image.swapaxes(0, 1)
    steps = [-1 if change else 1 for change in turn[1:]]
    return np.ascontiguousarray(image[:: steps[0], :: steps[1]])


def _stored_box(part: Part, turn: Turn, shape: tuple[int, int]) -> Box:
    """Returns the part of a stored image of `shape` that is `part` of the upright one."""
    rows, columns = shape[::-1] if turn.transpose else shape
    top, left, height, width = part((rows, columns))
    if turn.upside_down:
        top = rows - top - height
    if turn.mirror:
        left = columns - left - width
    return (left, top, width, height) if turn.transpose else (top, left, height, width)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Returns ``[h, w, 1 or 3]`` with another number of channels: luma, or three equal ones."""
    if image.shape[2] == channels:
        return image
    if channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    return image.repeat(channels, axis=2)


def _decode_jpeg(found: jpeg.Jpeg, channels: int, box: Part | None) -> np.ndarray:
    frame = found.frame
    divisor = _divisor(found)
    size = math.ceil(frame.height / divisor), math.ceil(frame.width / divisor)
    place = box(size) if box else None
    image = jpeg.decode(found, channels, place and place[0] + place[2], divisor)
    is_whole = image is not None and (frame.marker in jpeg.HUFFMAN or divisor > 1)
    if image is None or image.shape[2] != channels or not is_whole:  # for OpenCV
        if divisor > 1:
            raise ValueError(_too_large(frame.height, frame.width))
        image = _decode_all(found.data, channels)
        if not is_whole:
            jpeg.check_end(found, image, _decode_all(jpeg.lengthened(found), channels))
    return cut(image, place) if place else image


def _divisor(found: jpeg.Jpeg) -> int:
    """Returns the smallest divisor of a JPEG's sides that leaves no more than `ALLOWED_PIXELS`.

    Raises ValueError if there is none, or if libjpeg would hold more than `ALLOWED_COEFFICIENTS`
    bytes: it holds a JPEG of several scans as a whole.
    """
    frame = found.frame
    if frame.height * frame.width <= ALLOWED_PIXELS:
        return 1
    for divisor in jpeg.DIVISORS:
        pixels = math.ceil(frame.height / divisor) * math.ceil(frame.width / divisor)
        if pixels <= ALLOWED_PIXELS and (
            found.is_one_scan or jpeg.COEFFICIENTS * frame.blocks() <= ALLOWED_COEFFICIENTS
        ):
            return divisor
    raise ValueError(_too_large(frame.height, frame.width))


def _too_large(*size: int) -> str:
    given = "x".join(map(str, reversed(size))) or "too many"
    return (
        f"the image has {given} pixels, and {MAX_PIXELS}={os.environ.get(MAX_PIXELS)} allows "
        f"{ALLOWED_PIXELS}: make it smaller, or set that variable. A JPEG may have "
        f"{jpeg.DIVISORS[-1] ** 2} times as many, if it is grey or in colour, and "
        f"{ALLOWED_COEFFICIENTS // 10**6} MB of coefficients if it is progressive"
    )


def _decode_all(data: bytes, channels: int) -> np.ndarray:
    kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    raw = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(raw, kind | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        if "MAX_IMAGE" in error.err:
            raise ValueError(_too_large()) from error
        raise ValueError(f"the image cannot be decoded: {error.err}") from error
    if image is None:
        raise ValueError("the image cannot be decoded: it is damaged or cut short")
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
    """Records of a prepared TFDS split. `channels`: 1, 3, or None for those of the data set."""

    def __init__(self, source: records.Records, channels: int | None = None):
        self._source = source
        self._label, self._image = label_and_image(source.info)
        self.classes, stored, self.shape = facts(source.info)
        self.channels = channels or stored
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
        else:
            image = with_channels(image, self.channels)
            image = cut(image, part((image.shape[0], image.shape[1]))) if part else image
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
