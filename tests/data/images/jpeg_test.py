# SPDX-License-Identifier: Apache-2.0
import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from localglobal_jax.data.images import jpeg
from localglobal_jax.data.images.readers import cut, decode

SOME = settings(deadline=None, max_examples=40)
CHROMA = {  # OpenCV's names: factors of the luma, across and down
    "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "440": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
}


def picture(height, width):
    """Coarse and fine structure, so that every block and its neighbours matter."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    fine = rng.integers(-40, 40, (height, width, 3))
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + fine, 0, 255).astype(np.uint8)


def encode(image, chroma="420", **kwargs):
    flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, CHROMA[chroma]]
    for name, value in kwargs.items():
        flags += [getattr(cv2, f"IMWRITE_JPEG_{name.upper()}"), value]
    return cv2.imencode(".jpg", image, flags)[1].tobytes()


def pillow(mode, **kwargs):
    buffer = io.BytesIO()
    Image.fromarray(picture(70, 90)).convert(mode).save(buffer, "JPEG", **kwargs)
    return buffer.getvalue()


@st.composite
def boxes(draw):
    """The shape of an image, and a box in it."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    box = top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    return (height, width), box


@settings(deadline=None, max_examples=150)
@given(boxes(), st.sampled_from([*CHROMA]), st.sampled_from([0, 3]))
def test_a_part_has_the_pixels_of_the_whole(boxes, chroma, restart):
    shape, box = boxes
    data = encode(picture(*shape), chroma, rst_interval=restart)
    found = jpeg.parse(data)
    assert found.has_upper_rows and (found.frame.height, found.frame.width) == shape
    np.testing.assert_array_equal(decode(data, 3, lambda _: box), cut(decode(data, 3), box))


def test_no_more_rows_are_decoded_than_needed():
    data = encode(picture(400, 30))
    assert len(jpeg.decode(jpeg.parse(data), 3, 100)) == 112


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(70, 90), progressive=1),
        pillow("L"),
        pillow("CMYK"),
        pillow("RGB", subsampling="4:1:1"),
        pillow("RGB", exif=b"Exif\0\0" + bytes(300)),
        pillow("RGB", keep_rgb=True),
    ],
    ids=["progressive", "grey", "cmyk", "4:1:1", "exif", "rgb"],
)
def test_other_jpegs(data):
    for channels in (1, 3):
        whole, asked = decode(data, channels), []

        def part(shape, asked=asked):
            asked.append(shape)
            return 8, 3, 40, 60

        np.testing.assert_array_equal(decode(data, channels, part), whole[8:48, 3:63])
        assert asked == [(70, 90)]  # once: it draws random numbers


@SOME
@given(st.data())
def test_damage_is_treated_as_in_a_whole_image(data):
    """What one decodes, the other does, unless the damage is below the part."""
    whole = bytearray(encode(picture(64, 64)))
    start = whole.index(b"\xff\xda") if data.draw(st.booleans()) else 2
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(start, len(whole) - 1))] = data.draw(st.integers(0, 255))
    sizes = []

    def part(shape):
        sizes.append(shape)
        return 0, 0, *shape

    try:
        expected = decode(bytes(whole), 3)
    except ValueError:
        with pytest.raises(ValueError, match=r"JPEG|image"):
            decode(bytes(whole), 3, part)
        return
    np.testing.assert_array_equal(decode(bytes(whole), 3, part), expected)
    assert sizes == [expected.shape[:2]]


@SOME
@given(st.binary(max_size=60))
def test_any_header_is_read_or_refused(rest):
    for start in (b"\xff\xd8", b"\xff\xd8\xff\xc0\0\x11\x08", b"\xff\xd8\xff\xda\0\x0c\3"):
        with pytest.raises(ValueError, match=r"JPEG|image"):
            jpeg.parse(start + rest)
