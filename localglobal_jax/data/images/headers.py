# SPDX-License-Identifier: Apache-2.0
"""Checks of an encoded image that OpenCV does not make before it allocates memory or decodes.

OpenCV bounds the pixels itself (``OPENCV_IO_MAX_IMAGE_PIXELS``, set in the package's __init__).
It does not bound the length that a PNG's chunk announces (45 bytes can take gigabytes), and of an
animated PNG it gives the first frame, not the default image. For JPEGs see `jpeg`.
"""

import struct
from typing import Literal, NamedTuple

from localglobal_jax.data.images import jpeg

FORMATS = "JPEG, PNG, GIF, BMP or WebP"

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# Major brands of HEIC and AVIF files (ISO/IEC 23008-12, annex B)
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # chunks of an animated PNG
ORIENTATION = 0x0112  # the tag of EXIF
BYTES = {1: 1, 3: 2, 4: 4}  # of EXIF's types of whole numbers
ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


class Checked(NamedTuple):
    """An encoded image that may be decoded."""

    data: bytes  # without what follows its end; of an animated PNG only the default image
    exif: bytes = b""  # TIFF data; empty if there is none
    structure: jpeg.Jpeg | None = None  # of a JPEG

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8; 1, as stored, if there is none that can be read."""
        return read_orientation(self.exif)


def checked(data: bytes) -> Checked:
    """Returns the image to decode.

    Raises ValueError for another format than `FORMATS`, for a JPEG or PNG that is cut short or
    damaged (see `jpeg.parse`), and for a PNG with a chunk that is longer than the file.
    """
    if data.startswith(JPEG):
        found = jpeg.parse(data)
        return Checked(found.data, found.exif, found)
    if data.startswith(PNG):
        return _check_png(data)
    if data.startswith((b"GIF8", b"BM")):
        return Checked(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Checked(data, _exif_of_webp(data))
    heif = data[4:8] == b"ftyp" and data[8:12] in HEIF
    known = " but HEIC or AVIF, whatever its name: convert it to JPEG" if heif else ""
    raise ValueError(f"the image cannot be decoded: it is not a {FORMATS} file{known}")


def read_orientation(exif: bytes) -> int:
    """Returns the orientation that TIFF data has in its first directory; 1 if there is none."""
    if exif[:4] not in ORDERS:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], ORDERS[exif[:4]])

    directory = number(4, 4)
    for i in range(number(directory, 2)):
        entry = directory + 2 + 12 * i
        if entry + 12 > len(exif):
            break
        if number(entry, 2) == ORIENTATION:
            found = number(entry + 8, BYTES.get(number(entry + 2, 2), 0))
            return found if 1 <= found <= 8 else 1
    return 1


def _check_png(data: bytes) -> Checked:
    """Returns a PNG up to its end, without the chunks of its animation."""
    kept, exif, at, kind = [PNG], b"", len(PNG), b""
    while kind != b"IEND":  # of a chunk: length, kind, that many bytes, checksum
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + size
        if at + 12 > len(data) or end > len(data):
            raise ValueError(
                f"the PNG is cut short, or damaged: the chunk at byte {at} ends at {end}"
            )
        kind = data[at + 4 : at + 8]
        if kind not in ANIMATION:
            kept.append(data[at:end])
        if kind == b"eXIf":
            exif = data[at + 8 : at + 8 + size]
        at = end
    return Checked(b"".join(kept), exif)


def _exif_of_webp(data: bytes) -> bytes:
    """Returns the TIFF data of a WebP file; empty if it has none."""
    end, at = min(len(data), 8 + struct.unpack_from("<I", data, 4)[0]), 12
    while at + 8 <= end:  # of a chunk: kind, length, that many bytes, one more if they are odd
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"EXIF":
            return data[at + 8 : at + 8 + size].removeprefix(jpeg.EXIF)
        at += 8 + size + size % 2
    return b""
