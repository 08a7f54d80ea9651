# SPDX-License-Identifier: Apache-2.0
"""Reads TFRecord files without TensorFlow, every checksum verified.

The format: for each record a little-endian uint64 length, the masked CRC-32C of those eight bytes,
the data, and the masked CRC-32C of the data (tensorflow/core/lib/io/record_writer.h).
"""

import pathlib
import struct
from collections.abc import Iterator

import google_crc32c

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's masked CRC-32C: rotated and shifted, since a CRC of CRCs is weak."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_tfrecord(path: str | pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a file in order.

    Raises ValueError with the file and the record's number at the first byte that is wrong or
    missing: what follows a damaged length could not be found anyway.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        number = 0
        while header := file.read(HEADER.size):
            if len(header) < HEADER.size:
                raise ValueError(f"{path}: record {number} is cut off in its header")
            length, crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                raise ValueError(f"{path}: record {number} has a damaged length (checksum differs)")
            if file.tell() + length + FOOTER.size > size:
                raise ValueError(f"{path}: record {number} is cut off, {length} bytes announced")
            data = file.read(length)
            if masked_crc(data) != FOOTER.unpack(file.read(FOOTER.size))[0]:
                raise ValueError(f"{path}: record {number} has damaged data (checksum differs)")
            yield data
            number += 1
