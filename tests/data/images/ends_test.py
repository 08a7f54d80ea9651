# SPDX-License-Identifier: Apache-2.0
"""A picture ends at its own end marker: what follows is ignored, and a cut before it is found."""

import io
import itertools
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from localglobal_jax.data.images import jpeg
from localglobal_jax.data.images.readers import decode

MANY = settings(deadline=None, max_examples=150)
MARKERS = b"a\xff\xd9b\xff\xda\xff\xd8c\xff\xd8\xff"  # in a comment


def picture(height, width, noise):
    rng = np.random.default_rng(height * width)
    smooth = cv2.resize(rng.integers(0, 256, (5, 7, 3), np.uint8), (width, height))
    return np.clip(smooth + rng.integers(-noise, noise + 1, smooth.shape), 0, 255).astype(np.uint8)


def encode(kind="JPEG", mode="RGB", size=(40, 50), noise=10, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture(*size, noise)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


THUMBNAIL = encode(size=(24, 32))
# An orientation and, after it, a thumbnail with its own markers.
EXIF = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0" + THUMBNAIL
OTHER = encode(size=(150, 90))
TAILS = {
    "a scan": b"\xff\xda",
    "600 scans": b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 600,
    "an end": b"\xff\xd9",
    "a motion photo": b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(range(256)) * 20,
    "multi-picture": OTHER + THUMBNAIL,
    "multi-picture, with EXIF": encode(exif=EXIF) + OTHER,
    "fill bytes": b"\xff" * 9,
    "a restart": b"\xff\xd0\xff\xd1",
    "zeros": bytes(1000),
    "a segment": b"\xff\xe1\xff\xffExif\0\0",
    "a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}


@st.composite
def jpegs(draw):
    """A JPEG that Pillow writes."""
    options = {
        "size": (draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        "noise": draw(st.sampled_from([0, 30])),
        "quality": draw(st.sampled_from([30, 75, 95])),
        "progressive": draw(st.booleans()),
        "optimize": draw(st.booleans()),
        "restart_marker_blocks": draw(st.sampled_from([0, 1, 3])),
        "mode": draw(st.sampled_from(["RGB", "RGB", "L", "CMYK"])),
        "subsampling": draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "4:1:1"])),
        "exif": draw(st.sampled_from([b"", EXIF])),
        "comment": draw(st.sampled_from([b"", MARKERS])),
    }
    return encode(**options)


tails = st.sampled_from([*TAILS.values()]) | st.binary(max_size=400)


@MANY
@given(jpegs(), tails)
def test_what_follows_a_jpeg_changes_nothing(data, tail):
    expected = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    np.testing.assert_array_equal(decode(data + tail, 3), expected)
    np.testing.assert_array_equal(decode(data + tail, 3, lambda _: (0, 0, 1, 1)), expected[:1, :1])


@MANY
@given(jpegs(), st.floats(0, 1, exclude_max=True), st.sampled_from([b"", *TAILS.values()]))
def test_a_jpeg_that_is_cut_anywhere_is_refused(data, share, tail):
    place = int(share * (len(data) - 2))
    whole_again = place == 0 or (data[:place] + tail).startswith(data[:-2] + b"\xff\xd9")
    if whole_again:
        return
    with pytest.raises(ValueError, match=r"JPEG|image"):
        decode(data[:place] + tail, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_jpeg_is_refused_for_each_of_its_bytes_that_is_missing(progressive, restarts):
    data = encode(progressive=progressive, restart_marker_blocks=restarts, size=(20, 17))
    for tail, place in itertools.product((b"", b"\xff\xd9"), range(1, len(data) - 2)):
        with pytest.raises(ValueError, match=r"JPEG|image"):
            decode(data[:place] + tail, 3)


def test_a_cut_that_the_part_reaches_is_refused():
    data = encode(size=(400, 60), noise=30)
    half = data[: len(data) // 2] + b"\xff\xd9"
    np.testing.assert_array_equal(decode(half, 3, lambda _: (0, 0, 100, 60)), decode(data, 3)[:100])
    with pytest.raises(ValueError, match="cut short"):
        decode(half, 3, lambda _: (200, 0, 100, 60))


def scans(data):
    return jpeg.parse(data).scans


def test_a_progressive_jpeg_cut_between_two_scans_is_refused():
    data = encode(progressive=True)
    assert len(scans(data)) > 5
    for scan in scans(data)[:-1]:
        with pytest.raises(ValueError, match="scan"):
            decode(data[: scan.end] + b"\xff\xd9", 3)


def test_fill_bytes_and_bytes_between_segments():
    data = encode()
    expected = decode(data, 3)
    tables = data.index(b"\xff\xdb")
    for between in (b"\xff\xff\xff", b"\0\0", b"\0\xff\0", b"\xff\x01", b"\xff\xd3"):
        np.testing.assert_array_equal(decode(data[:tables] + between + data[tables:], 3), expected)
    end = scans(data)[0].end
    for surplus in (b"\0", b"\0\0\0\0", b"\xff\xff"):
        np.testing.assert_array_equal(decode(data[:end] + surplus + data[end:], 3), expected)


def test_the_number_of_lines_may_follow_the_scan():
    data = encode()
    frame, (scan,) = jpeg.parse(data).frame, scans(data)
    lines = b"\xff\xdc\0\4" + struct.pack(">H", frame.height)
    later = jpeg.with_height(data, frame, 0)
    later = later[: scan.end] + lines + later[scan.end :]
    np.testing.assert_array_equal(decode(later, 3), decode(data, 3))


def test_a_lost_restart_marker_is_left_to_libjpeg():
    data = encode(restart_marker_blocks=1)
    data = data.replace(b"\xff\xd3", b"\xff\x00", 1)
    assert decode(data, 3).shape == (40, 50, 3)


def test_a_jpeg_whose_header_goes_on_in_another_jpeg():
    """The segment in which the first one was cut takes bytes of the second one."""
    data = encode(comment=b"text " * 200)
    comment = data.index(b"text ")
    for place in (19, comment + 3, comment + 998, comment + 1000 - OTHER.index(b"\xff\xdb")):
        with pytest.raises(ValueError, match="another"):
            decode(data[:place] + OTHER, 3)


# cjpeg -arithmetic
ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb004300100b0c0e0c0a100e0d0e1211101318281a1816"
    "16183123251d283a333d3c3933383740485c4e404457453738506d51575f626768673e4d71797064785c6567"
    "63ffc9000b080040004001011100ffcc000600101005ffda0008010100003f00fd39423b8fdbbfdad6450097"
    "08533360f09b75bcd3140b4a5bc03b49c4b3508005494a3b52a0eba3f77f35850ccd953bb73a74c48976348b"
    "69431ddc6bccc25492d95963d779cabdca985ff7bb935d0067470f603e5cc85141c5adea81b4ed739026e69e"
    "fa4522f6c7b9b364f64447caab7d77fd2ba9fcf147ad199c3ac9f24323b115b1738f36cc0ecd3f523630a5e4"
    "7bf9a3913f36269e674990aeeb32b836f7cadc2e5b32fcf1ea9f4eee551a2f00aabef81aa0ffd9"
)


def test_an_arithmetic_coded_jpeg():
    image = decode(ARITHMETIC, 3)
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(decode(ARITHMETIC + b"\xff\xda", 3), image)
    with pytest.raises(ValueError, match="cut short"):
        decode(ARITHMETIC[: len(ARITHMETIC) * 2 // 3] + b"\xff\xd9", 3)


# --------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"),
     ("BMP", "P"), ("WEBP", "RGBA")],
)  # fmt: skip
def test_the_end_of_other_formats(kind, mode):
    data = encode(kind, mode, size=(20, 17))
    expected = decode(data, 3)
    for tail in (*TAILS.values(), data, b"a", bytes(9), data[: len(data) // 2]):
        np.testing.assert_array_equal(decode(data + tail, 3), expected)
    for place in range(len(data)):
        with pytest.raises(ValueError, match=r"PNG|image"):
            decode(data[:place], 3)


def test_a_png_with_less_data_than_pixels_is_refused():
    data = encode("PNG", size=(20, 17))
    at = data.index(b"IDAT")
    pixels = zlib.decompress(data[at + 4 : at + 4 + struct.unpack_from(">I", data, at - 4)[0]])
    end = data[data.index(b"IEND") - 4 :]

    def chunk(content):
        body = b"IDAT" + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    packed = zlib.compress(pixels)
    whole = data[: at - 4] + chunk(packed) + end
    np.testing.assert_array_equal(decode(whole, 3), decode(data, 3))
    for less in (zlib.compress(pixels[:-60]), packed[: len(packed) // 2]):
        with pytest.raises(ValueError, match="image"):
            decode(data[: at - 4] + chunk(less) + end, 3)
