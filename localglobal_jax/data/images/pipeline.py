# SPDX-License-Identifier: Apache-2.0
"""Images and labels of a TFDS split as batches of uint8 arrays, for `loader`.

`open_split` is the door. Behind it, a record takes two steps: decoding and resizing, which is the
same every time and is done once for sets that fit in memory, and the random changes of training.
Where the images wait in between changes no pixel.
"""

import concurrent.futures
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data import identity
from localglobal_jax.data.images import augment, folder, label_maps, randaugment
from localglobal_jax.data.images.folder_reader import CHANNELS, FolderReader
from localglobal_jax.data.images.readers import (
    Box,
    MockReader,
    Part,
    Reader,
    RecordReader,
    cut,
    facts,
    label_and_image,
)
from localglobal_jax.data.loader import Batch, PositionRng
from localglobal_jax.data.tfds import prepare, records
from localglobal_jax.data.tfds.builders import EMBEDDED

log = logging.getLogger(__name__)
_NOTED: set[tuple[Any, ...]] = set()  # data sets whose aspect was noted
IN_MEMORY = 2 * 2**30  # bytes below which a decoded split is kept, if the options do not say
BLOCK = 1024  # records read at a time while filling the memory
EVAL_FRACTION = 0.875  # of the image that evaluation sees after training on resized crops
SAME_ASPECT = 1.02  # ratio of aspects below which squashing is not seen
CROP, CHANGE = 0, 1  # streams of random numbers


def describe(options: schema.Images) -> tuple[int, int]:
    """Returns classes and channels of a data set, prepared or not."""
    if options.name == folder.NAME:
        count = len(folder.classes(options.dir, options.layout))
        return count, options.channels or CHANNELS
    info = records.find_builder(options.name, records.data_root(options.dir)).info
    classes, channels, _ = facts(info)
    return classes, options.channels or channels


def class_names(options: schema.Images) -> tuple[str, ...]:
    """Returns the names of the classes by number; () for a data set without names.

    The names of some TFDS data sets are only in their prepared files: () until these exist.
    """
    if options.name == folder.NAME:
        return tuple(folder.classes(options.dir, options.layout))
    info = records.find_builder(options.name, records.data_root(options.dir)).info
    names = tuple(info.features[label_and_image(info)[0]].names)
    return () if names == tuple(map(str, range(len(names)))) else names


def for_evaluation(image: np.ndarray, options: schema.Images) -> np.ndarray:
    """Returns ``uint8 [h, w, c]`` as ``[*image_size, c]``, cropped as in evaluation."""
    crop = _evaluation_crop(options)
    if crop == "squash":
        if options.eval_crop is None:
            _note_aspect((image.shape[0], image.shape[1]), options)
        return augment.resize(image, options.image_size, options.interpolation)
    return augment.center_crop(image, options.image_size, crop, options.interpolation)


def seen_in_evaluation(shape: tuple[int, int], options: schema.Images) -> tuple[int, int, int, int]:
    """Returns ``(top, left, height, width)`` of evaluation's crop of an image of ``shape``.

    With ``eval_crop`` above 1, it is larger than the image.
    """
    crop = _evaluation_crop(options)
    if crop == "squash":
        return 0, 0, *shape
    return augment.center_box(shape, options.image_size, crop)


def _evaluation_crop(options: schema.Images) -> float | Literal["squash"]:
    if options.eval_crop is not None:
        return options.eval_crop
    return EVAL_FRACTION if options.crop == "resized" else "squash"


def _note_aspect(shape: tuple[int, int], options: schema.Images) -> None:
    """Warns, once for a data set, of images whose aspect is not that of ``image_size``."""
    key = (options.name, options.dir, options.image_size)
    aspect = shape[0] * options.image_size[1] / (shape[1] * options.image_size[0])
    if key not in _NOTED and not 1 / SAME_ASPECT < aspect < SAME_ASPECT:
        _NOTED.add(key)
        log.warning(
            "an image of %s, of %dx%d pixels, is squashed to data.image_size=%s, and others may "
            "be. data.eval_crop=1.0 keeps the aspect and takes the centre; data.eval_crop=squash "
            "silences this",
            *(options.name, *shape, options.image_size),
        )


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
            mean = sum(given) / max(1, len(given))
            raise ValueError(
                f"data.{name}={given} has {len(given)} values, but the images of {options.name} "
                f"have {channels} channels: give one value, such as ({mean:.3f},), or one for each"
            )


def _reader(options: schema.Images, split: str, train: bool) -> Reader:
    if options.mock:
        return MockReader(*describe(options), options.image_size, train)
    if options.name == folder.NAME:
        return FolderReader(
            options.dir,
            split,
            options.layout,
            channels=options.channels or CHANNELS,
            upright=bool(options.exif_orientation),
        ).announce()
    root = records.data_root(options.dir)
    builder = records.find_builder(options.name, root)
    if options.name in EMBEDDED and not records.is_prepared(builder):
        prepare.prepare(options.name, root)
        builder = records.find_builder(options.name, root)
    return RecordReader(records.Records(builder, split), options.channels)


class ImageSource:
    """A `loader.Source` of ``image: uint8 [b, h, w, c]``, ``label: int32 [b]``, ``mask``."""

    def __init__(self, reader: Reader, options: schema.Images, *, train: bool):
        self.classes, self.channels = reader.classes, reader.channels
        self._reader, self._options, self._train = reader, options, train
        self._tolerance = records.BadRecordBudget(options.max_bad_records)
        self.use_threads(options.threads)
        self._maps = self._open_maps() if train and options.label_maps else None
        self._memory = self._load() if self._fits() else None

    def __getstate__(self) -> dict[str, Any]:
        left = ("_pool", "_tolerance")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a source in a worker. It tolerates bad records: the parent counts them."""
        vars(self).update(state)
        self._tolerance = records.BadRecordBudget(len(self))
        self.use_threads(self._options.threads)

    def use_threads(self, count: int) -> None:
        """Decodes and changes images in so many threads from now on."""
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "images")

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def bad(self) -> frozenset[int]:
        """Numbers of the bad records that this process has met and tolerated."""
        return frozenset(self._tolerance.seen)

    def class_counts(self) -> list[int]:
        """Returns the number of images of every class, without those known to be bad.

        Reads every record of a TFDS data set that is not in memory.
        """
        if self._memory is not None:
            _, labels, mask = self._memory
            return np.bincount(labels[mask > 0], minlength=self.classes).tolist()
        if isinstance(self._reader, FolderReader):
            return [*self._reader.balance().values()]
        counts = np.zeros(self.classes, np.int64)
        for start in range(0, len(self), BLOCK):
            numbers = range(start, min(start + BLOCK, len(self)))
            for record in self._reader.block(numbers):
                label = -1  # a wrong one is met, and counted, in training
                with contextlib.suppress(ValueError, TypeError, LookupError):
                    if not isinstance(record, records.BadRecord):
                        label = self._reader.label(record)
                if 0 <= label < self.classes:
                    counts[label] += 1
        return counts.tolist()

    @property
    def order(self) -> str:
        """Identifies the records and their order, see `identity`."""
        parts: dict[str, str] = {}
        if isinstance(self._reader, FolderReader):
            parts = self._reader.identity()
        elif isinstance(self._reader, RecordReader):
            parts = identity.of_sample(len(self), self._reader.block)
        return identity.line(f"{len(self)} images", parts)

    @property
    def records(self) -> Sequence[identity.Record]:
        """The names of the records; empty for a data set without names."""
        return getattr(self._reader, "identities", ())

    def batch(self, index: np.ndarray, draws: PositionRng | None) -> Batch:
        """Returns a batch; see `loader.Source`. A training split has no evaluation batches."""
        if (draws is not None) != self._train:
            raise ValueError(f"this split was opened with train={self._train}")
        crops = self._crops(draws, len(index))
        images, labels, mask = self._gather(index, crops)
        stacked = images if draws is None else self._augment(images, draws)
        if not mask.all():
            stacked = np.where(mask[:, None, None, None] > 0, stacked, np.uint8(0))
        found = {"image": stacked, "label": labels, "mask": mask}
        return found | (self._label_maps(crops) if self._maps else {})

    def admit(self, index: np.ndarray) -> None:
        """Notes records that a worker could not use, each once; see `loader.Source`."""
        for number in index.tolist():
            if number not in self._tolerance.seen:
                self._decode(self._reader.block([number])[0], number, None)

    def timed(self, index: np.ndarray, draws: PositionRng) -> tuple[dict[str, float], int]:
        """Returns the seconds of each stage of a training batch in one thread, and bytes read."""
        began = time.perf_counter()
        read = self._reader.block(index.tolist())
        ended = [time.perf_counter()]
        if self._memory is None:
            images = []
            crops: list[_RandomCrop | None] = [*self._crops(draws, len(index))]
            crops = crops or [None] * len(index)
            for record, number, crop in zip(read, index.tolist(), crops, strict=True):
                images.append(self._decode(record, number, crop.box if crop else None)[0])
            ended.append(time.perf_counter())
            shown = [
                crop.finish(image) if crop else for_evaluation(image, self._options)
                for image, crop in zip(images, crops, strict=True)
                if image is not None
            ]
        else:
            ended.append(ended[0])
            shown = list(self._gather(index, self._crops(draws, len(index)))[0])
        self._augment(np.asarray(shown), draws)
        ended.append(time.perf_counter())
        names = ("reading", "decoding", "augmentation")
        seconds = dict(zip(names, np.diff([began, *ended]).tolist(), strict=True))
        if self._memory is not None:
            return {"augmentation": seconds["augmentation"]}, 0
        return seconds, sum(_encoded_size(record) for record in read)

    # ------------------------------------------------------------- the same every time

    def _crops_original(self) -> bool:
        return self._train and self._options.crop == "resized"

    def _shape(self) -> tuple[int, int] | None:
        """Returns (height, width) of every decoded image; None if they differ."""
        return self._reader.shape if self._crops_original() else self._options.image_size

    def _fits(self) -> bool:
        if self._maps:
            return False
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

    def _open_maps(self) -> label_maps.LabelMaps | None:
        """Opens ``data.label_maps``; None for mock images."""
        options = self._options
        if options.mock:
            return None
        if options.crop != "resized" or options.in_memory:
            raise ValueError(
                f"data.label_maps are read with each image, and cropped with it: set data.crop="
                f"resized, not {options.crop}, and data.in_memory=False"
            )
        directory = str(options.label_maps)
        if isinstance(self._reader, FolderReader):
            self._reader.check_names()
        for index in range(min(options.max_bad_records, len(self) - 1) + 1):
            (first,) = self._reader.block([index])
            try:  # a record without a map counts as bad when it is read
                if isinstance(first, records.BadRecord):
                    raise first
                return label_maps.LabelMaps(
                    directory, self.classes, self._reader.name(first, index)
                )
            except ValueError as error:
                failed = ValueError(f"data.label_maps={directory}: of image {index}: {error}")
                failed.__cause__ = error
        raise failed

    def _label_maps(self, crops: "Sequence[_RandomCrop]") -> Batch:
        """Returns the label maps of a batch and their boxes; those of masked images are zeros."""
        assert self._maps is not None
        maps = np.zeros((len(crops), *self._maps.shape), self._maps.dtype)
        boxes = np.tile(np.array([0, 0, 1, 1, 0], np.float32), (len(crops), 1))
        for i, crop in enumerate(crops):
            if crop.label_map is not None:
                maps[i], boxes[i] = crop.label_map, crop.share()
        return {"label_map": maps, "label_box": boxes}

    def _gather(
        self, index: np.ndarray, crops: "Sequence[_RandomCrop]"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns images (cropped and flipped if the crop is "resized"), labels and mask."""
        if self._memory is None:
            return self._decode_all(index, crops)
        images, labels, mask = self._memory
        if crops:
            chosen = [images[number] for number in index.tolist()]
            images = np.stack(list(self._pool.map(_RandomCrop.whole, crops, chosen)))
            return images, labels[index], mask[index]
        return images[index], labels[index], mask[index]

    def _crops(self, draws: PositionRng | None, count: int) -> "list[_RandomCrop]":
        """Returns the random crops of a batch; none where the original is not cropped."""
        if draws is None or not self._crops_original():
            return []
        options = self._options
        flips = draws.uniforms(count, 3)[:, 2] < 0.5 if options.flip else np.zeros(count, bool)
        return [_RandomCrop(options, draws, i, flip) for i, flip in enumerate(flips.tolist())]

    def _decode_all(
        self, index: np.ndarray, crops: "Sequence[_RandomCrop]" = ()
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """Returns images, labels and mask.

        Originals that will be cropped later are a list, all other images one array.
        """
        numbers, size = index.tolist(), self._options.image_size
        original = self._crops_original() and not crops
        images: Any = [None] * len(numbers)
        if not original:
            images = np.empty((len(numbers), *size, self.channels), np.uint8)

        def decode(record: Any, number: int, i: int) -> tuple[int, float]:
            """Decodes a record into its slot, so that few originals are in memory at a time."""
            crop = crops[i] if crops else None
            image, label, mask = self._decode(record, number, crop.box if crop else None, crop)
            if image is None:
                shape = self._shape() if original else None
                image = np.zeros((*(shape or size), self.channels), np.uint8)
            elif crop:
                image = crop.finish(image)
            elif not original:
                image = for_evaluation(image, self._options)
            images[i] = image
            return label, mask

        slots = range(len(numbers))
        done = list(self._pool.map(decode, self._reader.block(numbers), numbers, slots))
        labels, mask = zip(*done, strict=True)
        return images, np.array(labels, np.int32), np.array(mask, np.float32)

    def _decode(
        self, record: Any, index: int, part: Part | None, crop: "_RandomCrop | None" = None
    ) -> tuple[np.ndarray | None, int, float]:
        """Returns image, label and mask of a record; None, 0 and 0 for a tolerated bad one."""
        try:
            if isinstance(record, records.BadRecord):
                raise record
            image, label = self._reader.decode(record, part)
            if not 0 <= label < self.classes:
                raise ValueError(f"its label is {label}, want 0 to {self.classes - 1}")
            if self._maps:
                found = self._maps.read(self._reader.name(record, index))
                if crop:
                    crop.label_map = found
        except (ValueError, TypeError, LookupError, cv2.error) as error:  # what garbage leads to
            bad = error if isinstance(error, records.BadRecord) else self._reader.bad(index, error)
            self._tolerance.admit(index, bad)
            return None, 0, 0.0
        return image, label, 1.0

    # ------------------------------------------------------------- another one every time

    def _augment(self, images: np.ndarray, draws: PositionRng) -> np.ndarray:
        options = self._options
        uniforms = draws.uniforms(len(images), 3)
        if options.crop == "pad":
            images = augment.pad_crop(images, options.pad, uniforms[:, :2])
        if options.flip and options.crop != "resized":
            images = augment.flip(images, uniforms[:, 2])
        if options.randaugment_layers or options.erase:

            def change(image: np.ndarray, i: int) -> np.ndarray:
                generator = draws.generator(i, CHANGE)
                image = randaugment.randaugment(
                    image,
                    options.randaugment_layers,
                    options.randaugment_magnitude,
                    generator,
                    scale=options.randaugment_scale,
                    probability=options.randaugment_probability,
                    noise=options.randaugment_noise,
                )
                return augment.random_erase(image, options.erase, generator)

            images = np.stack(list(self._pool.map(change, images, range(len(images)))))
        return images


def _encoded_size(record: Any) -> int:
    """Returns the bytes in an undecoded record."""
    values = record.values() if isinstance(record, dict) else record
    return sum(len(v) for v in values if isinstance(v, bytes)) if np.iterable(values) else 0


class _RandomCrop:
    """The random "resized" crop of one image, and its flip."""

    def __init__(self, options: schema.Images, draws: PositionRng, i: int, flip: bool):
        self._options, self._flip = options, flip
        self._rng = draws.generator(i, CROP)
        self._drawn: tuple[Box, tuple[int, int]] | None = None  # the box, and (height, width)
        self.label_map: np.ndarray | None = None

    def box(self, shape: tuple[int, int]) -> Box:
        """Returns the crop of an image of ``(height, width)``. Draws anew at every call."""
        box = augment.random_box(shape, self._options.image_size, self._options.area, self._rng)
        self._drawn = box, shape
        return box

    def share(self) -> tuple[float, ...]:
        """Returns the drawn box as shares of the image's height and width, and 1 if flipped."""
        assert self._drawn is not None
        (top, left, height, width), (h, w) = self._drawn
        return top / h, left / w, height / h, width / w, float(self._flip)

    def finish(self, image: np.ndarray) -> np.ndarray:
        """Returns what is inside the box, resized and flipped."""
        options = self._options
        image = augment.resize_crop(image, options.image_size, options.interpolation)
        return cv2.flip(image, 1).reshape(image.shape) if self._flip else image

    def whole(self, image: np.ndarray) -> np.ndarray:
        """Returns the crop of a whole image."""
        return self.finish(cut(image, self.box((image.shape[0], image.shape[1]))))
