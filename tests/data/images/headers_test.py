# SPDX-License-Identifier: Apache-2.0
"""Images that would take gigabytes or minutes to decode raise ValueError instead."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from localglobal_jax.data.images import headers
from localglobal_jax.data.images.readers import decode


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PIXELS = zlib.compress(bytes(99))


def png(width, height, pixels=PIXELS, colour=2):
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(width, height, **options):
    """With another size in its header than its pixels have."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG", **options))
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_of_an_animation_the_picture_that_stands_still(kind):
    one, two = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (9, 7), "blue")
    apart = {"default_image": True} if kind == "PNG" else {"lossless": True}
    data = encode(one, kind, save_all=True, append_images=[two, one], **apart)
    image = decode(data, 3)
    assert image.shape == (7, 9, 3) and (image == [255, 0, 0]).all()
    assert headers.checked(data).data == data or kind == "PNG"


@pytest.mark.parametrize(
    "data",
    [png(60_000, 60_000), png(2**31 - 1, 1), png(0, 5), png(5, 0), jpeg(65_500, 65_500),
     jpeg(30_000, 30_000), jpeg(9_999, 10_002, progressive=True), jpeg(0, 0),
     b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(50),
     b"BM" + bytes(12) + struct.pack("<Iii", 40, 60_000, -60_000) + bytes(50),
     b"BM" + bytes(12) + struct.pack("<Iii", 40, -9, 9) + bytes(50),
     b"RIFF\xff\0\0\0WEBPVP8X" + bytes(8) + b"\xff" * 6 + bytes(50)],
)  # fmt: skip
def test_too_many_pixels_or_none_are_refused_before_decoding(data):
    with pytest.raises(ValueError, match=r"image|JPEG"):
        decode(data, 3)


def test_a_hundred_megapixels_are_decoded():
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(10_001)) for _ in range(2_000)) + packer.flush()
    assert decode(png(10_000, 2_000, rows, colour=0), 1).shape == (2_000, 10_000, 1)
    with pytest.raises(ValueError, match="OPENCV_IO_MAX_IMAGE_PIXELS=100000000"):
        decode(png(10_000, 10_001), 1)


@pytest.mark.parametrize(
    "imports", ["import localglobal_jax", "import cv2, localglobal_jax", "import cv2"]
)
def test_the_bound_on_pixels_is_set_before_opencv_reads_it(imports):
    """Where cv2 is imported first, the bound is OpenCV's, and the log names the variable."""
    code = f"{imports}\nimport localglobal_jax.data.images.readers as r, cv2, os\n"
    environment = {k: v for k, v in os.environ.items() if k != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    done = subprocess.run(
        [sys.executable, "-c", code + "print(os.environ.get(r.MAX_PIXELS))"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first = imports.startswith("import cv2")
    assert done.stdout.strip() == ("None" if first else "100000000")
    assert ("OPENCV_IO_MAX_IMAGE_PIXELS" in done.stderr) == first


def test_a_chunk_longer_than_the_file_is_refused():
    data = png(9, 7)
    at = data.index(b"IDAT") - 4
    with pytest.raises(ValueError, match=f"byte {at} ends at {at + 12 + 2**31 - 1}"):
        decode(data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :], 3)


def test_thousands_of_scans_are_refused():
    data = jpeg(2000, 2000, progressive=True)
    last = data[data.rindex(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    # decoding them would take minutes
    with pytest.raises(ValueError, match="500"):
        decode(data[:-2] + last * 50_000 + data[-2:], 3)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_heic_under_the_name_of_a_jpeg_is_named(brand):
    with pytest.raises(ValueError, match="HEIC"):
        headers.checked(b"\0\0\0\x18ftyp" + brand + bytes(40))


@settings(deadline=None, max_examples=300)
@given(start=st.sampled_from([b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"",
                              b"RIFF0000WEBPVP8X", b"RIFF0000WEBPVP8L", b"RIFF0000WEBPVP8 "]),
       rest=st.binary(max_size=80))  # fmt: skip
def test_any_header_is_accepted_or_gives_a_clear_error(start, rest):
    try:
        headers.checked(start + rest)
    except ValueError as error:
        assert "image" in str(error) or "JPEG" in str(error) or "PNG" in str(error)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO"])
def test_other_formats_are_named(kind):
    with pytest.raises(ValueError, match=headers.FORMATS):
        decode(encode(Image.new("RGB", (9, 9)), kind), 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transparency", [3, bytes(range(16))])
def test_a_palette_keeps_the_colours_of_what_is_transparent(channels, transparency):
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    image = Image.fromarray(colours).quantize(16)
    data = encode(image, "PNG", transparency=transparency)
    wanted = np.array(image.convert("RGB" if channels == 3 else "L")).reshape(6, 9, channels)
    assert np.abs(decode(data, channels).astype(int) - wanted).max() <= (channels == 1)
