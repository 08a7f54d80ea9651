# SPDX-License-Identifier: Apache-2.0
"""Structure of JPEG files (ITU-T T.81, annex B), and their decoding by libjpeg-turbo.

A file is judged by the picture's own markers, from its start marker to its own end marker. What
follows, such as the video of a motion photo, is not looked at. Inside entropy-coded data a 0xFF is
followed by 0x00 or a restart marker, so that the next marker is found without decoding.

A JPEG of one scan stores its rows in order, and most of the decoder's time goes into entropy-coded
data. OpenCV and `simplejpeg` decode all rows. `decode` with ``rows`` lowers the number of rows in
the frame header first, and libjpeg-turbo, in `simplejpeg`, stops there. The pixels are those of the
whole image, bit for bit.
"""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg

MAX_SCANS = 500  # each a pass over all pixels; cjpeg -progressive writes ten
BLOCK = 16  # rows: a multiple of the rows of every unit that is decoded at once
CONTEXT = 2  # rows below that smooth chroma of half the height depends on
DIVISORS = (2, 4, 8)  # of the sides: libjpeg then computes only a part of each block
COEFFICIENTS = 128  # bytes of a block, where libjpeg holds them all

SOI, EOI, SOS, DRI, DNL, APP1, COM = 0xD8, 0xD9, 0xDA, 0xDD, 0xDC, 0xE1, 0xFE
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), (0xC2, 0xCA)  # frames
HUFFMAN = (*SEQUENTIAL, 0xC2)
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
TEMPORARY = 0x01  # the one marker without a length besides SOI, EOI and restarts
UNKNOWN = (*range(0x02, 0xC0), 0xC8, *range(0xF0, COM))  # reserved: libjpeg gives up
EXIF = b"Exif\0\0"
ANOTHER = b"\xff\xd8\xff"  # the start of a JPEG
CUT = "the JPEG is cut short"
# libjpeg's messages. After those of a data segment it has filled up the picture with grey.
CUTS = ("premature end", "Premature end", "found marker 0xd9 instead of RST")
SURPLUS = "extraneous bytes before marker 0xd9"  # found after all pixels

# By the byte that follows a 0xFF: part of the data, a restart marker, or another one.
RESTART, STOP = 1, 2
KINDS = np.array([0, *[STOP] * 207, *[RESTART] * 8, *[STOP] * 39, 0], np.uint8)
FILLER = bytes(range(254, -1, -1)) * 4  # neither 0xFF nor the zeros that libjpeg adds

Pixels = np.ndarray


class Component(NamedTuple):
    """A colour of a frame, and its sampling factors."""

    number: int
    across: int
    down: int


class Frame(NamedTuple):
    """The frame header: the kind of coding, the size, and the byte that holds the height."""

    marker: int
    bits: int
    height: int
    width: int
    components: tuple[Component, ...]
    at: int

    @property
    def sampling(self) -> tuple[int, int]:
        """The largest sampling factors, (across, down)."""
        return max(c.across for c in self.components), max(c.down for c in self.components)

    def blocks(self, components: Sequence[Component] = ()) -> int:
        """Returns the number of blocks of 8x8 samples that these components need, or all."""
        wide, high = self.sampling
        return sum(
            math.ceil(math.ceil(self.width * component.across / wide) / 8)
            * math.ceil(math.ceil(self.height * component.down / high) / 8)
            for component in components or self.components
        )


class Scan(NamedTuple):
    """A scan header, and its entropy-coded data."""

    components: tuple[int, ...]  # their numbers
    first: int  # coefficients, from 0 to 63
    last: int
    low: int  # bits that a later scan has to refine
    interval: int  # units between two restart markers; 0: none
    start: int  # bytes of the file
    end: int


class Jpeg(NamedTuple):
    """The structure of a whole JPEG."""

    data: bytes  # from the start marker to the end marker, with the height in its header
    frame: Frame
    scans: tuple[Scan, ...]
    exif: bytes  # TIFF data; empty if there is none

    @property
    def is_one_scan(self) -> bool:
        """True if one scan, sequential and Huffman-coded, holds all components in order of rows."""
        return self.frame.marker in SEQUENTIAL and len(self.scans) == 1

    @property
    def has_upper_rows(self) -> bool:
        """True if the upper rows can be decoded alone: no unit reaches beyond `BLOCK` rows."""
        return self.is_one_scan and self.frame.sampling[1] <= 2


# ------------------------------------------------------------------------------- structure


def parse(data: bytes) -> Jpeg:
    """Returns the structure of the JPEG that `data` begins with.

    Raises ValueError if it is cut short, has more than `MAX_SCANS` scans, or cannot be a picture.
    Fill bytes, and bytes between two segments, are passed over as in libjpeg. A cut inside
    entropy-coded data of which enough is left is found by `decode`.
    """
    raw = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(raw[:-1] == 0xFF)
    codes = raw[places + 1]
    kinds = KINDS[codes]
    restarts, stops = places[kinds == RESTART], places[kinds == STOP].tolist()
    frame, exif, interval, lines = None, b"", 0, 0
    scans: list[Scan] = []
    kept: list[bytes] = []  # without the bytes between two segments
    begun = 0
    at, here, segment = 2, 0, (2, 2)  # the segment before `at`
    while True:
        here = bisect.bisect_left(stops, at, here)
        if here == len(stops):
            raise ValueError(f"{CUT}: no end marker follows byte {at}")
        place = stops[here]
        marker = data[place + 1]
        garbage = place > at and data[at:place].strip(b"\xff")
        if data.find(ANOTHER, segment[0], place + 1) >= 0:
            _check_segment(data, *segment, place if garbage else at)
        if garbage:
            kept.append(data[begun:at])
            begun = place
        if marker == EOI:
            break
        if marker == SOI:
            raise ValueError(f"{CUT}: another one begins at byte {place}")
        if marker in UNKNOWN:
            raise ValueError(f"the JPEG is damaged: it has the marker {marker:#x} at byte {place}")
        if marker == TEMPORARY:
            at, segment = place + 2, (place + 2, place + 2)
            continue
        body, end = place + 4, place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if not body <= end <= len(data):
            raise ValueError(f"{CUT}, or damaged: the segment at byte {place} ends at byte {end}")
        at, segment = end, (body, end)
        if marker in FRAMES and frame:
            raise ValueError(f"{CUT}, or damaged: byte {place} begins another picture")
        if marker in FRAMES:
            frame = _frame(marker, data, body, end)
        elif marker == DRI and end == body + 2:
            interval = int.from_bytes(data[body:end], "big")
        elif marker == DNL and len(scans) == 1:
            lines = int.from_bytes(data[body:end], "big")
        elif marker == APP1 and not (exif or scans) and data.startswith(EXIF, body):
            exif = data[body + len(EXIF) : end]
        elif marker == SOS:
            here = bisect.bisect_left(stops, end, here)
            at = stops[here] if here < len(stops) else len(data)
            segment = (at, at)
            scans.append(_scan(data[body:end], interval, end, at))
            if len(scans) > MAX_SCANS:
                raise ValueError(f"the JPEG has more scans than {MAX_SCANS}")
    if frame is None or not scans:
        raise ValueError(f"{CUT}: it ends at byte {place}, before its picture begins")
    data = data[: place + 2]
    if begun:  # libjpeg warns, and skips the bytes between two segments
        return parse(b"".join([*kept, data[begun:]]))
    if not frame.width or not (frame.height or lines):
        raise ValueError(f"the image has no pixels: its size is {frame.width}x{frame.height}")
    if not frame.height:  # libjpeg reads the height from the frame header alone
        frame = frame._replace(height=lines)
        data = with_height(data, frame, lines)
    jpeg = Jpeg(data, frame, tuple(scans), exif)
    _check_scans(jpeg, restarts)
    return jpeg


def with_height(data: bytes, frame: Frame, rows: int) -> bytes:
    """Returns a JPEG with another number of rows in its frame header."""
    return data[: frame.at] + rows.to_bytes(2, "big") + data[frame.at + 2 :]


def _check_segment(data: bytes, body: int, end: int, following: int) -> None:
    """Raises ValueError if a segment holds the start of another JPEG, which goes on after it.

    Such a file was cut in that segment, and joined with another one. The start of a thumbnail comes
    with its end, or, if it is split over several segments, does not end with a segment of its own.
    `following`: the byte of the next marker; those between it and `end` belong to no segment.
    """
    at = data.find(ANOTHER, body, following + 1)
    while at >= 0:
        inside = at + 2
        while inside < end and data[inside + 1] not in (EOI, SOS):
            inside += 2 + int.from_bytes(data[inside + 2 : inside + 4], "big")
        ended = data.find(bytes([0xFF, EOI]), at, end) >= 0
        known = data[at + 6 : at + 10] in (b"JFIF", b"Exif")
        if known and (inside == end or (following > end and not ended)):
            raise ValueError(f"{CUT}: another one begins at byte {at}, in its header")
        at = data.find(ANOTHER, at + 1, following + 1)


def _frame(marker: int, data: bytes, body: int, end: int) -> Frame:
    height, width = (int.from_bytes(data[body + i : body + i + 2], "big") for i in (1, 3))
    components = tuple(
        Component(data[i], data[i + 1] >> 4, data[i + 1] & 15) for i in range(body + 6, end - 2, 3)
    )
    if not components or not all(component.across and component.down for component in components):
        raise ValueError("the JPEG is damaged: its frame header names no components")
    return Frame(int(marker), data[body], height, width, components, body + 1)


def _scan(header: bytes, interval: int, start: int, end: int) -> Scan:
    count = header[0] if header else 0
    if len(header) != 4 + 2 * count:
        raise ValueError("the JPEG is damaged: the header of a scan has another length")
    first, last, low = header[1 + 2 * count], header[2 + 2 * count], header[3 + 2 * count] & 15
    return Scan(tuple(header[1 : 1 + 2 * count : 2]), first, last, low, interval, start, end)


def _check_scans(jpeg: Jpeg, restarts: np.ndarray) -> None:
    """Raises ValueError if the scans do not hold a whole picture of the frame's size."""
    frame, scans = jpeg.frame, jpeg.scans
    if frame.marker in PROGRESSIVE or len(scans[0].components) < len(frame.components):
        _check_coefficients(jpeg)
    bits = 8 * sum(scan.end - scan.start for scan in scans)
    least = frame.blocks() * (2 if frame.marker in SEQUENTIAL else 1)
    if frame.marker in HUFFMAN and bits < least:
        raise ValueError(
            f"{CUT}: an image of {frame.width}x{frame.height} pixels takes at least "
            f"{least // 8} bytes, its scans have {bits // 8}"
        )
    for scan in scans:
        if scan.interval:
            _check_restarts(jpeg, scan, restarts)


def _check_coefficients(jpeg: Jpeg) -> None:
    """Raises ValueError if no scan has the last bit of a coefficient."""
    missing = np.ones((256, 64), np.int8)  # by the number of a component
    for scan in jpeg.scans:
        progressive = jpeg.frame.marker in PROGRESSIVE
        last, low = (scan.last, scan.low) if progressive else (63, 0)
        missing[list(scan.components), scan.first : last + 1] = low
    if missing[[component.number for component in jpeg.frame.components]].any():
        raise ValueError(f"{CUT}: a scan is missing after the last of {len(jpeg.scans)}")


def _check_restarts(jpeg: Jpeg, scan: Scan, restarts: np.ndarray) -> None:
    """Raises ValueError if a scan ends before its last restart marker.

    One that is lost between others is left to libjpeg.
    """
    first, stop = np.searchsorted(restarts, (scan.start, scan.end))
    found = restarts[first:stop]
    numbers = np.frombuffer(jpeg.data, np.uint8)[found + 1] & 7
    wanted = (_units(jpeg.frame, scan) - 1) // scan.interval
    if len(found) < wanted and (numbers == np.arange(len(found)) % 8).all():
        raise ValueError(
            f"{CUT}: a scan ends at byte {scan.end}, after {len(found)} of {wanted} restart markers"
        )


def _units(frame: Frame, scan: Scan) -> int:
    """Returns the number of units (MCU) of a scan (T.81, A.2)."""
    if len(scan.components) == 1:
        own = [c for c in frame.components if c.number == scan.components[0]][:1]
        return frame.blocks(own)
    wide, high = frame.sampling
    return math.ceil(frame.width / (8 * wide)) * math.ceil(frame.height / (8 * high))


# -------------------------------------------------------------------------------- decoding


def lengthened(jpeg: Jpeg) -> bytes:
    """Returns a JPEG with more data at the end of its last scan.

    The pixels of a whole picture are the same, since libjpeg passes over the surplus; if it is
    arithmetic-coded, the last unit may differ. In one that is cut short, the surplus takes the
    place of what is missing.
    """
    end = jpeg.scans[-1].end
    stuffed = b"\0" if jpeg.data[end - 1] == 0xFF else b""  # the cut was between the two
    return jpeg.data[:end] + stuffed + FILLER + jpeg.data[end:]


def check_end(jpeg: Jpeg, pixels: np.ndarray, longer: np.ndarray) -> None:
    """Raises ValueError if the pixels of a JPEG are not those of the `lengthened` one."""
    differs = (pixels != longer).any(-1)
    if jpeg.frame.marker not in HUFFMAN:
        wide, high = jpeg.frame.sampling
        differs[-16 * high :, -16 * wide :] = False  # the last unit, and chroma smoothed with it
    if differs.any():
        raise ValueError(f"{CUT}: its last scan ends before its last pixel")


def decode(jpeg: Jpeg, channels: int, rows: int | None = None, divisor: int = 1) -> Pixels | None:
    """Returns ``uint8 [h, w, channels]``, red first, or [h, w, 4] in CMYK, without conversion.

    None: libjpeg warns of the file, and OpenCV has to tell whether it is whole.

    `rows`: at least so many of the upper rows, if `Jpeg.has_upper_rows`. `divisor` of the
    sides: 1, 2, 4 or 8. Raises ValueError for a file that is cut short inside entropy-coded data.
    """
    frame, data = jpeg.frame, jpeg.data
    height = frame.height
    if rows is not None and divisor == 1 and jpeg.has_upper_rows:
        height = min(height, -(-(rows + CONTEXT) // BLOCK) * BLOCK)
        data = with_height(data, frame, height)
    space = {1: {1: "GRAY", 3: "GRAY"}, 3: {1: "RGB", 3: "RGB"}}[channels].get(
        len(frame.components), "CMYK"
    )
    shape = math.ceil(height / divisor), math.ceil(frame.width / divisor)
    least = dict(zip(("min_height", "min_width"), shape, strict=True)) if divisor > 1 else {}
    pixels = np.empty((*shape, {"GRAY": 1, "RGB": 3, "CMYK": 4}[space]), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, space, buffer=pixels, **least)
    except ValueError as error:  # or a warning
        if any(cut in str(error) for cut in CUTS):
            raise ValueError(f"{CUT}: {error}") from None
        if not str(error).endswith(SURPLUS):
            if divisor == 1:
                return None
            simplejpeg.decode_jpeg(data, space, buffer=pixels, strict=False, **least)
    return pixels
