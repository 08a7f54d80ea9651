# SPDX-License-Identifier: Apache-2.0
"""Reads the pictures of a split of a folder."""

import collections
import concurrent.futures
import functools
import hashlib
import logging
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, Self

import cv2
import numpy as np

from localglobal_jax.data import identity
from localglobal_jax.data.images import folder, folder_notes, headers, readers
from localglobal_jax.data.images.layout import shorten
from localglobal_jax.data.images.scan import readable, same_name
from localglobal_jax.data.tfds import gcs, records

log = logging.getLogger(__name__)

CHANNELS = 3  # unless data.channels has another number
THREADS = 8
REQUESTS = 32  # pictures of a bucket that are fetched at a time
MARKED = 100_000  # pictures; of more, resuming compares names and sizes only
EDGE = 4096  # bytes at the start and the end of a file that tell contents apart


class FolderReader:
    """A `readers.Reader` of the pictures of a split; see `readers.decode` for the options."""

    shape: tuple[int, int] | None = None  # they differ

    def __init__(
        self,
        directory: str | None,
        split: str,
        layout: str = "auto",
        *,
        opened: folder.Folder | None = None,
        channels: int = CHANNELS,
        upright: bool = False,
    ):
        self.channels, self.upright, self.turned = channels, upright, 0
        opened = opened or folder.open_folder(directory, layout)
        self.names, self.split = opened.layout.labels, split
        self.pictures, self.classes = folder.pictures_of(opened, split), len(self.names)
        self._notes = folder_notes.of_folder(opened) if split == "train" else []
        marks = opened.found.marks  # of a bucket, by path below the root
        below = len(str(opened.root)) + 1
        self._marks = [marks[str(p.path)[below:]] for p in self.pictures] if marks else []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "identities"}

    def balance(self) -> dict[str, int]:
        """Returns the number of pictures per class."""
        labels = collections.Counter(picture.label for picture in self.pictures)
        return {name: labels[i] for i, name in enumerate(self.names)}

    def announce(self) -> Self:
        """Logs the balance, what is left out of training, and returns the reader."""
        balance = self.balance()
        if self.split == "train":
            for text in self._notes + folder_notes.of_balance(balance):
                log.warning("%s", text)
        shown = shorten(f"{name} {n}" for name, n in balance.items())
        log.info("pictures %s: %d (%s)", self.split, len(self), shown)
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
        if not data:
            raise ValueError("the file is empty")
        return readers.decode(data, self.channels, part, upright=self.upright), label

    def label(self, record: tuple[bytes, int]) -> int:
        return record[1]

    def name(self, record: tuple[bytes, int], index: int) -> str:
        return os.path.splitext(self.pictures[index].name)[0]

    def check_names(self) -> None:
        """Raises ValueError if two pictures have one `name`, as ``1.jpg`` and ``1.png`` do."""
        seen: dict[str, int] = {}
        for i, picture in enumerate(self.pictures):
            name = os.path.splitext(picture.name)[0]
            if (twin := seen.setdefault(name, i)) != i:
                raise ValueError(
                    f"{self._shown(twin)} and {self._shown(i)} would have the same label map, "
                    f"{readable(name)}: rename one of them, and its map"
                )

    def bad(self, index: int, why: object) -> records.BadRecord:
        return records.BadRecord(
            f"{self._shown(index)}: {why}. Mend or remove it, or skip a few such files "
            "with data.max_bad_records"
        )

    def _shown(self, index: int) -> str:
        return readable(str(self.pictures[index].path))

    def checked(self) -> list[tuple[str, bytes]]:
        """Returns ``("FILE: why", digest)`` of every picture; "" for one that can be decoded.

        Counts in `turned` those that can be decoded and have an EXIF orientation.
        """

        def check(index: int) -> tuple[str, bytes, bool]:
            record = self._read(index)
            if isinstance(record, records.BadRecord):
                return str(record), os.urandom(16), False  # not a copy of another
            mark = hashlib.blake2b(record[0], digest_size=16).digest()
            try:
                self.decode(record)
                turned = headers.checked(record[0]).orientation > 1
            except (ValueError, cv2.error) as error:
                return f"{self._shown(index)}: {error}", mark, False
            return "", mark, turned

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(check, range(len(self))))
        self.turned = sum(turned for _, _, turned in found)  # not by the threads: they lose some
        return [(why, mark) for why, mark, _ in found]

    @functools.cached_property
    def identities(self) -> list[identity.Record]:
        """The name, size and mark of every picture, see `identity`."""
        if self._marks:
            sizes = (mark.split(" ") for mark in self._marks)
            found = [(int(size), f"crc32c {crc32c}") for size, crc32c in sizes]
        else:
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                paths = (picture.path for picture in self.pictures)
                found = list(pool.map(_edges if len(self) <= MARKED else _size, paths))
        return [
            identity.Record(same_name(picture.name), size, mark)
            for picture, (size, mark) in zip(self.pictures, found, strict=True)
        ]

    def identity(self) -> dict[str, str]:
        """Returns digests of the names and contents of the pictures, in their order."""
        kind = "crc32c" if self._marks else "edges" if len(self) <= MARKED else ""
        return identity.of_named(self.identities, kind)


def _size(path: pathlib.Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, ""
    except OSError:
        return -1, ""


def _edges(path: pathlib.Path) -> tuple[int, str]:
    """Returns the size of a file, and a checksum of its first and last bytes."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            value = zlib.crc32(file.read(EDGE))
            if size > EDGE:
                file.seek(max(EDGE, size - EDGE))
                value = zlib.crc32(file.read(EDGE), value)
    except OSError:  # reading it will report that
        return -1, "unreadable"
    return size, f"edges {value:08x}"
