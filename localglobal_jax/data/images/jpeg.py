# SPDX-License-Identifier: Apache-2.0
"""Decoding of the upper rows of a JPEG: no further down than a crop needs.

A JPEG of one scan stores its rows in order, and most of the decoder's time goes into entropy-coded
data. OpenCV and `simplejpeg` decode all rows. Here the number of rows in the frame header (ITU-T
T.81, B.2.2) is lowered first, and libjpeg-turbo, in `simplejpeg`, stops there. The pixels are those
of the whole image, bit for bit.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg

BLOCK = 16  # rows: a multiple of the rows of every unit that is decoded at once
CONTEXT = 2  # rows below that smooth chroma of half the height depends on
FRAMES = (0xC0, 0xC1)  # markers of sequential frames, Huffman-coded
SCAN = 0xDA
WITHOUT_LENGTH = (0x01, *range(0xD0, 0xDA))  # markers that no length follows


class Frame(NamedTuple):
    """Size of an image, and the byte at which its file holds the height (two bytes)."""

    height: int
    width: int
    at: int


def find_frame(data: bytes) -> Frame | None:
    """Returns the frame of a JPEG whose upper rows can be decoded alone; None for any other file.

    It can if it is sequential and Huffman-coded, has 8 bits a sample and three components in one
    scan, and its chroma has at least half of the rows.
    """
    frame, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in WITHOUT_LENGTH or length < 2 or at + 2 + length > len(data):
            return None
        if marker in FRAMES:
            bits, components = data[at + 4], data[at + 9 : at + 10]
            rows = [sampling & 15 for sampling in data[at + 11 : at + 2 + length : 3]]
            if frame or bits != 8 or components != b"\3" or length != 17 or max(rows) > 2:
                return None
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            frame = Frame(height, width, at + 5)
        elif marker == SCAN:
            return frame if frame and frame.height and data[at + 4] == 3 else None
        at += 2 + length
    return None


def decode_rows(data: bytes, frame: Frame, rows: int) -> np.ndarray:
    """Returns at least the first ``rows`` rows, ``uint8 [>= rows, w, 3]``, red first.

    Raises ValueError for a file that libjpeg-turbo cannot decode.
    """
    kept = min(frame.height, -(-(rows + CONTEXT) // BLOCK) * BLOCK)
    lowered = data[: frame.at] + kept.to_bytes(2, "big") + data[frame.at + 2 :]
    # Not strict: the data below the last row would be an error.
    return simplejpeg.decode_jpeg(lowered, "RGB", strict=False)
