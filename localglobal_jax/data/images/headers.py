# SPDX-License-Identifier: Apache-2.0
"""Checks of an encoded image that OpenCV does not make before it allocates memory or decodes.

OpenCV bounds the pixels itself (``OPENCV_IO_MAX_IMAGE_PIXELS``, set in the package's __init__).
It does not bound the scans of a JPEG (half a megabyte can keep a processor busy for minutes) nor
the length that a PNG's chunk announces (45 bytes can take gigabytes), it fills up a JPEG that is
cut short with grey, and of an animated PNG it gives the first frame, not the default image.
"""

import struct

import numpy as np

MAX_SCANS = 500  # of a JPEG, each a pass over all pixels; cjpeg -progressive writes ten
FORMATS = "JPEG, PNG, GIF, BMP or WebP"

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
SCAN, END = b"\xff\xda", b"\xff\xd9"  # markers of a JPEG
ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # chunks of an animated PNG


def checked(data: bytes) -> bytes:
    """Returns the image to decode: ``data``, of an animated PNG only the default image.

    Raises ValueError for another format than `FORMATS`, for a JPEG of more than `MAX_SCANS` scans
    or without an end, and for a PNG with a chunk that is longer than the file.
    """
    if data.startswith(JPEG):
        scans = _find_scans(data)
        if len(scans) > MAX_SCANS:
            raise ValueError(f"the JPEG has {len(scans)} scans: want at most {MAX_SCANS}")
        if data.rfind(END) < (scans[-1] if len(scans) else -1):
            raise ValueError("the JPEG is cut short: no end marker follows its last scan")
        return data
    if data.startswith(PNG):
        return _default_image(data)
    if data.startswith((b"GIF8", b"BM")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return data
    raise ValueError(f"the image cannot be decoded: it is not a {FORMATS} file")


def _find_scans(data: bytes) -> np.ndarray:
    """Returns the places of `SCAN`; five times as fast as ``data.count``, and without the lock."""
    raw = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(raw[1:] == SCAN[1])
    return at[raw[at] == SCAN[0]]


def _default_image(data: bytes) -> bytes:
    """Returns a PNG without the chunks of its animation."""
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):  # of a chunk: length, kind, that many bytes, checksum
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        if end > len(data):
            raise ValueError(
                f"the PNG is cut short, or damaged: the chunk at byte {at} ends at {end}"
            )
        if data[at + 4 : at + 8] not in ANIMATION:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
