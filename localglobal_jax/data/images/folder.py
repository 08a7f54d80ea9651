# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: one folder per class, ``DIR/cat/1.jpg``, ``DIR/dog/2.png``.

Where DIR holds the folder ``train``, its folders are the splits (``validation`` may be called
``val``), each with folders of classes. Else a picture's split is a function of its class and name,
so that it stays where it is when others come or go.
"""

import collections
import concurrent.futures
import hashlib
import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import cv2
import numpy as np

from localglobal_jax.config.validation import unknown
from localglobal_jax.data.images import readers
from localglobal_jax.data.tfds import gcs, records

log = logging.getLogger(__name__)

NAME = "folder"  # in place of a TFDS name
SPLITS = ("train", "validation", "test")
EVERY = 10  # one picture in so many is for testing, one for validation
ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
SHOWN = 20  # files in an error
THREADS = 8
REQUESTS = 32  # pictures of a bucket that are fetched at a time


class Picture(NamedTuple):
    """An image file and the number of its class."""

    path: pathlib.Path
    label: int


def classes(directory: str | None) -> list[str]:
    """Returns the names of classes, sorted by name; ValueError for fewer than two."""
    root = _root(directory)
    found = [path.name for path in _folders(root / "train" if _is_split(root) else root)]
    if len(found) < 2:
        raise ValueError(
            f"{root} has {len(found)} folders of pictures: want one per class, such as "
            f"{root}/cat and {root}/dog, or these in {root}/train and {root}/validation"
        )
    return found


def pictures(directory: str | None, split: str) -> list[Picture]:
    """Returns the pictures of a split, sorted by name. Raises ValueError if there are none."""
    root, names = _root(directory), classes(directory)
    if split not in SPLITS:
        raise unknown("split of a folder (data.train_split, data.eval_splits):", split, SPLITS)
    inside = _inside(root, split)
    found, ignored = [], []
    for folder in _folders(inside) if inside.is_dir() else []:
        if folder.name not in names:
            raise ValueError(f"{folder}: {root}/train has no such class, but {', '.join(names)}")
        for path in gcs.files_below(folder):
            if path.name.startswith("."):
                continue
            if path.suffix.lower() not in ENDINGS:
                ignored.append(str(path))
            elif inside != root or split_of(str(path.relative_to(root))) == split:
                found.append(Picture(path, names.index(folder.name)))
    if split == "train" or inside != root:  # else the splits are of the same folders
        beside = sorted(inside.iterdir()) if inside.is_dir() else []
        ignored += [str(path) for path in beside if path.suffix.lower() in ENDINGS]
        if ignored:
            shown = ", ".join(ignored[:SHOWN])
            why = "no JPEG, PNG, GIF, BMP or WebP, or in no folder of a class"
            log.warning("left out (%s): %d, such as %s", why, len(ignored), shown)
    if not found:
        raise ValueError(
            f"no picture of {root} is in the split {split}: have more, or say which by the "
            f"folders {root}/train/CLASS and {root}/{split}/CLASS"
        )
    return found


def split_of(name: str) -> str:
    """Returns the split of ``CLASS/NAME`` in a folder without splits: a function of the name."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % EVERY
    return {0: "test", 1: "validation"}.get(number, "train")


def count(directory: str | None) -> dict[str, int]:
    """Returns ``{"train": 90, "train/cat": 45, ...}``, after decoding every picture.

    Raises ValueError that lists the files that are not whole pictures.
    """
    counts, bad, opened = {}, [], []
    root = _root(directory)
    for split in SPLITS:
        if _is_split(root) and not _inside(root, split).is_dir():
            continue
        reader = FolderReader(directory, split)
        opened.append(reader)
        counts[split] = len(reader)
        counts |= {f"{split}/{name}": n for name, n in reader.balance().items()}
        bad += reader.problems()
    if bad:
        for reader in opened:
            reader.announce()
        shown = "\n  ".join(bad[:SHOWN]) + (f"\n  and {len(bad) - SHOWN} more" * (len(bad) > SHOWN))
        raise ValueError(f"{len(bad)} files are not whole pictures:\n  {shown}")
    return counts


class FolderReader:
    """A `readers.Reader` of the pictures of a split, in colour."""

    channels = 3
    shape: tuple[int, int] | None = None  # they differ

    def __init__(self, directory: str | None, split: str):
        self.names, self.split = classes(directory), split
        self.pictures, self.classes = pictures(directory, split), len(self.names)
        empty = [name for name, n in self.balance().items() if not n]
        if split == "train" and empty:
            log.warning("warning: no picture to train on of %s", ", ".join(empty))

    def balance(self) -> dict[str, int]:
        """Returns the number of pictures per class."""
        labels = collections.Counter(picture.label for picture in self.pictures)
        return {name: labels[i] for i, name in enumerate(self.names)}

    def announce(self) -> Self:
        """Logs the balance and returns the reader."""
        balance = ", ".join(f"{name} {n}" for name, n in self.balance().items())
        log.info("pictures %s: %d (%s)", self.split, len(self), balance)
        return self

    def __len__(self) -> int:
        return len(self.pictures)

    def block(self, indices: Sequence[int]) -> list[tuple[bytes, int] | records.BadRecord]:
        if not gcs.is_bucket(self.pictures[0].path):
            return [self._read(index) for index in indices]
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self._read, indices))

    def _read(self, index: int) -> tuple[bytes, int] | records.BadRecord:
        picture = self.pictures[index]
        try:
            with gcs.named_in_errors(picture.path):
                return picture.path.read_bytes(), picture.label
        except OSError as error:
            if gcs.is_bucket(picture.path) and gcs.may_pass(error):
                raise  # of the network, not of the picture
            return self.bad(index, error.strerror or "it is missing")

    def decode(
        self, record: tuple[bytes, int], part: readers.Part | None = None
    ) -> tuple[np.ndarray, int]:
        data, label = record
        return readers.decode(data, self.channels, part), label

    def label(self, record: tuple[bytes, int]) -> int:
        return record[1]

    def name(self, record: tuple[bytes, int], index: int) -> str:
        picture = self.pictures[index]
        stem = picture.path.name.partition(".")[0]
        return f"{self.names[picture.label]}/{stem}"

    def bad(self, index: int, why: object) -> records.BadRecord:
        return records.BadRecord(
            f"{self.pictures[index].path}: {why}. Mend or remove it, or skip a few such files "
            "with data.max_bad_records"
        )

    def problems(self) -> list[str]:
        """Returns ``"FILE: why"`` for every picture that cannot be decoded."""

        def problem(index: int) -> str | None:
            record = self._read(index)
            try:
                if isinstance(record, records.BadRecord):
                    raise record
                self.decode(record)
            except (ValueError, cv2.error) as error:
                return f"{self.pictures[index].path}: {error}"
            return None

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return [found for found in pool.map(problem, range(len(self))) if found]


def _root(directory: str | None) -> pathlib.Path:
    if not directory:
        raise ValueError("data.name=folder needs data.dir: the folder with a folder per class")
    root = gcs.place(directory).expanduser()
    if gcs.is_bucket(root):
        gcs.check_bucket(root)
    if not root.is_dir():
        raise ValueError(f"data.dir={directory}: there is no such folder")
    return root


def _is_split(root: pathlib.Path) -> bool:
    return (root / "train").is_dir()


def _inside(root: pathlib.Path, split: str) -> pathlib.Path:
    """Returns the directory of the class folders of a split."""
    if not _is_split(root):
        return root
    short = root / "val"
    return short if split == "validation" and short.is_dir() else root / split


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
