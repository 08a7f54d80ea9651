# SPDX-License-Identifier: Apache-2.0
"""What an encoded image says of itself, read before anything is allocated for its pixels.

A megabyte of PNG can decode to six gigabytes, and half a megabyte of JPEG keep a processor busy for
minutes. OpenCV's own bound, 2**30 pixels, is far above what a machine with many threads can bear.
"""

import struct

MAX_PIXELS = 100_000_000  # 300 MB in colour, in each decoding thread
MAX_SCANS = 500  # of a JPEG, each a pass over all pixels; cjpeg -progressive writes ten
FORMATS = "JPEG, PNG, GIF, BMP or WebP"

PNG = b"\x89PNG\r\n\x1a\n"
ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # chunks of an animated PNG
NO_FRAME = (0xC4, 0xC8, 0xCC)  # markers among those of JPEG frames, 0xC0 to 0xCF, that are none
ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length behind them


def check(data: bytes) -> None:
    """Raises ValueError for another format, no pixels, or more of them (or scans) than allowed."""
    try:
        width, height = size(data)
    except (struct.error, IndexError):
        raise ValueError("the image is cut short, or damaged in its header") from None
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(
            f"the image says that it has {width}x{height} pixels: want at least one, and "
            f"at most {MAX_PIXELS:,} together"
        )
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"the JPEG has {scans} scans: want at most {MAX_SCANS}")


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in the header of a file of one of `FORMATS`; ValueError for any other."""
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == PNG:
        return struct.unpack_from(">II", data, 16)
    if data[:4] == b"GIF8":
        return struct.unpack_from("<HH", data, 6)
    if data[:2] == b"BM":
        old = struct.unpack_from("<I", data, 14)[0] == 12  # the header of OS/2
        width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
        return width, abs(height)  # negative: from the top down
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    raise ValueError(f"the image cannot be decoded: it is no {FORMATS}")


def _jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        while data[at] != 0xFF or data[at + 1] == 0xFF:  # fill bytes, or what does not belong here
            at += 1
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in (0xD9, 0xDA):
            raise ValueError("the JPEG has no frame")
        at += 2 if marker in ALONE else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":  # the canvas, each side less one in 24 bits
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        return width, height
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF  # the two upper bits scale it for display


def still(data: bytes) -> bytes:
    """A PNG without its animation, whose first picture may be another than the one to be seen."""
    if data[:8] != PNG or b"acTL" not in data:
        return data
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        if data[at + 4 : at + 8] not in ANIMATION:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
