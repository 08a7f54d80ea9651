# SPDX-License-Identifier: Apache-2.0
"""Images and labels of a TFDS split as batches of uint8 arrays, for `loader`.

`open_split` is the door. Behind it, a record takes two steps: decoding and resizing, which is the
same every time and is done once for sets that fit in memory, and the random changes of training.
Where the images wait in between changes no pixel.
"""

import concurrent.futures
import math
from typing import Any

import cv2
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data.images import augment, folder, randaugment
from localglobal_jax.data.images.readers import (
    MockReader,
    Reader,
    RecordReader,
    facts,
    label_and_image,
)
from localglobal_jax.data.loader import Batch, PositionRng
from localglobal_jax.data.tfds import prepare, records
from localglobal_jax.data.tfds.builders import EMBEDDED

IN_MEMORY = 2 * 2**30  # bytes below which a decoded split is kept, if the options do not say
BLOCK = 1024  # records read at a time while filling the memory
EVAL_FRACTION = 0.875  # of the image that evaluation sees after training on resized crops
CROP, CHANGE = 0, 1  # streams of random numbers


def describe(options: schema.Images) -> tuple[int, int]:
    """Returns classes and channels of a data set, prepared or not."""
    if options.name == folder.NAME:
        return len(folder.classes(options.dir)), folder.FolderReader.channels
    info = records.find_builder(options.name, records.data_root(options.dir)).info
    classes, channels, _ = facts(info)
    return classes, channels


def class_names(options: schema.Images) -> tuple[str, ...]:
    """Returns the names of the classes by number; () for a data set without names.

    The names of some TFDS data sets are only in their prepared files: () until these exist.
    """
    if options.name == folder.NAME:
        return tuple(folder.classes(options.dir))
    info = records.find_builder(options.name, records.data_root(options.dir)).info
    names = tuple(info.features[label_and_image(info)[0]].names)
    return () if names == tuple(map(str, range(len(names)))) else names


def for_evaluation(image: np.ndarray, options: schema.Images) -> np.ndarray:
    """Returns ``uint8 [h, w, c]`` as ``[*image_size, c]``, cropped as in evaluation."""
    top, left, height, width = seen_in_evaluation((image.shape[0], image.shape[1]), options)
    return augment.resize(image[top : top + height, left : left + width], options.image_size)


def seen_in_evaluation(shape: tuple[int, int], options: schema.Images) -> tuple[int, int, int, int]:
    """Returns ``(top, left, height, width)`` of evaluation's crop of an image of ``shape``."""
    if options.crop == "resized":
        return augment.center_box(shape, options.image_size, EVAL_FRACTION)
    return 0, 0, *shape


def open_split(options: schema.Images, split: str, *, train: bool) -> "ImageSource":
    """Returns the images of one split, for `loader.train_batches` or `loader.eval_batches`.

    Prepares an embedded data set by itself. Raises ValueError for a data set that is missing,
    damaged, or holds no images with class labels.
    """
    reader = _reader(options, split, train)
    check_channels(options, reader.channels)
    return ImageSource(reader, options, train=train)


def check_channels(options: schema.Images, channels: int) -> None:
    """Raises ValueError unless images of so many channels can be normalised."""
    for name in ("mean", "std"):
        if len(given := getattr(options, name)) not in (1, channels):
            raise ValueError(
                f"data.{name}={given} has {len(given)} values, but the images of {options.name} "
                f"have {channels} channels: give one value, or one per channel"
            )


def _reader(options: schema.Images, split: str, train: bool) -> Reader:
    if options.mock:
        return MockReader(*describe(options), options.image_size, train)
    if options.name == folder.NAME:
        return folder.FolderReader(options.dir, split).announce()
    root = records.data_root(options.dir)
    builder = records.find_builder(options.name, root)
    if options.name in EMBEDDED and not records.is_prepared(builder):
        prepare.prepare(options.name, root)
        builder = records.find_builder(options.name, root)
    return RecordReader(records.Records(builder, split))


class ImageSource:
    """A `loader.Source` of ``image: uint8 [b, h, w, c]``, ``label: int32 [b]``, ``mask``."""

    def __init__(self, reader: Reader, options: schema.Images, *, train: bool):
        self.classes, self.channels = reader.classes, reader.channels
        self._reader, self._options, self._train = reader, options, train
        self._tolerance = records.BadRecordBudget(options.max_bad_records)
        self._pool = concurrent.futures.ThreadPoolExecutor(options.threads, "images")
        self._memory = self._load() if self._fits() else None

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def skipped(self) -> int:
        """Number of bad records tolerated so far."""
        return len(self._tolerance.seen)

    def batch(self, index: np.ndarray, draws: PositionRng | None) -> Batch:
        """Returns a batch; see `loader.Source`. A training split has no evaluation batches."""
        if (draws is not None) != self._train:
            raise ValueError(f"this split was opened with train={self._train}")
        images, labels, mask = self._gather(index)
        if draws is not None:
            images = self._augment(images, draws)
        stacked = np.asarray(images)
        if not mask.all():
            stacked = np.where(mask[:, None, None, None] > 0, stacked, np.uint8(0))
        return {"image": stacked, "label": labels, "mask": mask}

    # ------------------------------------------------------------- the same every time

    def _crops_original(self) -> bool:
        return self._train and self._options.crop == "resized"

    def _shape(self) -> tuple[int, int] | None:
        """Returns (height, width) of every decoded image; None if they differ."""
        return self._reader.shape if self._crops_original() else self._options.image_size

    def _fits(self) -> bool:
        if self._options.in_memory is not None:
            return self._options.in_memory
        shape = self._shape()
        return shape is not None and len(self) * math.prod(shape) * self.channels < IN_MEMORY

    def _load(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """Returns all images, decoded: one array if they have one size, else a list."""
        size, shape = len(self), self._shape()
        images: Any = [None] * size
        if shape is not None:
            images = np.empty((size, *shape, self.channels), np.uint8)
        labels, mask = np.empty(size, np.int32), np.empty(size, np.float32)
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            images[part], labels[part], mask[part] = self._decode_all(np.arange(size)[part])
        return images, labels, mask

    def _gather(self, index: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        if self._memory is None:
            return self._decode_all(index)
        images, labels, mask = self._memory
        if isinstance(images, np.ndarray):
            return images[index], labels[index], mask[index]
        return [images[i] for i in index], labels[index], mask[index]

    def _decode_all(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        numbers = index.tolist()
        done = list(self._pool.map(self._decode, self._reader.block(numbers), numbers))
        images, labels, mask = zip(*done, strict=True)
        return list(images), np.array(labels, np.int32), np.array(mask, np.float32)

    def _decode(self, record: Any, index: int) -> tuple[np.ndarray, int, float]:
        """Returns image (resized), label and mask of a record; zeros for a tolerated bad one."""
        size = self._options.image_size
        try:
            if isinstance(record, records.BadRecord):
                raise record
            image, label = self._reader.decode(record)
            if not 0 <= label < self.classes:
                raise ValueError(f"its label is {label}, want 0 to {self.classes - 1}")
        except (ValueError, TypeError, LookupError, cv2.error) as error:  # what garbage leads to
            bad = error if isinstance(error, records.BadRecord) else self._reader.bad(index, error)
            self._tolerance.admit(index, bad)
            return np.zeros((*(self._shape() or size), self.channels), np.uint8), 0, 0.0
        if self._crops_original():
            return image, label, 1.0
        return for_evaluation(image, self._options), label, 1.0

    # ------------------------------------------------------------- another one every time

    def _augment(self, images: Any, draws: PositionRng) -> Any:
        options, size = self._options, self._options.image_size
        uniforms = draws.uniforms(len(images), 3)
        if options.crop == "resized":

            def crop(image: np.ndarray, i: int) -> np.ndarray:
                generator = draws.generator(i, CROP)
                return augment.random_resized_crop(image, size, options.area, generator)

            images = list(self._pool.map(crop, images, range(len(images))))
        images = np.asarray(images)
        if options.crop == "pad":
            images = augment.pad_crop(images, options.pad, uniforms[:, :2])
        if options.flip:
            images = augment.flip(images, uniforms[:, 2])
        if options.randaugment_layers or options.erase:

            def change(image: np.ndarray, i: int) -> np.ndarray:
                generator, layers = draws.generator(i, CHANGE), options.randaugment_layers
                magnitude = options.randaugment_magnitude
                image = randaugment.randaugment(image, layers, magnitude, generator)
                return augment.random_erase(image, options.erase, generator)

            images = np.stack(list(self._pool.map(change, images, range(len(images)))))
        return images
