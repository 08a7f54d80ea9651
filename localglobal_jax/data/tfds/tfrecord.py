# SPDX-License-Identifier: Apache-2.0
"""Reads TFRecord files without TensorFlow, every checksum verified.

The format: for each record a little-endian uint64 length, the masked CRC-32C of those eight bytes,
the data, and the masked CRC-32C of the data (tensorflow/core/lib/io/record_writer.h).
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c
from etils import epath

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size  # bytes of a record beyond its data
PIECE = 2**20  # bytes of a record that `scan` holds at a time


def masked(crc: int) -> int:
    """Returns TFRecord's mask of a CRC-32C: rotated and shifted, since a CRC of CRCs is weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's masked CRC-32C of some bytes."""
    return masked(google_crc32c.value(data))


def length_in(header: bytes) -> int | None:
    """Returns the length that a record's header announces, or None where its checksum differs."""
    length, crc = HEADER.unpack(header)
    return length if masked_crc(header[:8]) == crc else None


def read_tfrecord(path: str | os.PathLike) -> Iterator[bytes]:
    """Yields the records of a file in order.

    Raises ValueError with the file and the record's number at the first byte that is wrong or
    missing: what follows a damaged length could not be found anyway.
    """
    whole = epath.Path(path)
    size = whole.stat().length
    with whole.open("rb") as file:
        number = position = 0
        while header := file.read(HEADER.size):
            length = _checked_length(header, path, number)
            position += length + OVERHEAD
            if position > size:
                raise ValueError(f"{path}: record {number} is cut off, {length} bytes announced")
            data = file.read(length)
            if masked_crc(data) != FOOTER.unpack(file.read(FOOTER.size))[0]:
                raise ValueError(f"{path}: record {number} has damaged data (checksum differs)")
            yield data
            number += 1


def scan(file: BinaryIO, path: str | os.PathLike) -> Iterator[tuple[int, int, bool]]:
    """Yields (length, masked CRC-32C in the file, whether the data agrees with it) per record.

    Holds at most `PIECE` bytes of a record. Raises ValueError as `read_tfrecord`, except for
    damaged data, behind which the next record is found. ``path`` is for messages.
    """
    number = 0
    while header := file.read(HEADER.size):
        length = left = _checked_length(header, path, number)
        crc = 0
        while left and (piece := file.read(min(left, PIECE))):
            crc = google_crc32c.extend(crc, piece)
            left -= len(piece)
        footer = file.read(FOOTER.size)
        if len(footer) < FOOTER.size:
            raise ValueError(f"{path}: record {number} is cut off, {length} bytes announced")
        (found,) = FOOTER.unpack(footer)
        yield length, found, masked(crc) == found
        number += 1


def _checked_length(header: bytes, path: str | os.PathLike, number: int) -> int:
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: record {number} is cut off in its header")
    if (length := length_in(header)) is None:
        raise ValueError(f"{path}: record {number} has a damaged length (checksum differs)")
    return length
