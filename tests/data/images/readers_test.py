# SPDX-License-Identifier: Apache-2.0
import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from localglobal_jax.data.images import headers
from localglobal_jax.data.images.readers import MockReader, decode, facts
from localglobal_jax.data.tfds.records import find_builder


def picture():
    """Smooth, so that JPEG keeps it nearly as it is."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(coarse, (70, 50), interpolation=cv2.INTER_CUBIC)


def encode(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


IMAGE = picture()
PILLOW = Image.fromarray(IMAGE)
GREY = np.array(PILLOW.convert("L"))[..., None]


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        (encode(PILLOW, "PNG"), 0),
        (encode(PILLOW.convert("RGBA"), "PNG"), 0),
        (encode(PILLOW.quantize(256), "PNG"), 12),
        (encode(PILLOW, "JPEG", quality=95), 4),
        (encode(PILLOW, "JPEG", quality=95, progressive=True), 4),
        (encode(PILLOW.convert("CMYK"), "JPEG", quality=95), 4),
        (encode(PILLOW, "BMP"), 0),
    ],
    ids=["png", "alpha", "palette", "jpeg", "progressive", "cmyk", "bmp"],
)
def test_every_kind_of_image_becomes_rgb_or_grey_in_silence(data, allowed, capfd):
    for channels, wanted in ((3, IMAGE), (1, GREY)):
        image = decode(data, channels)
        assert image.dtype == np.uint8 and image.shape == wanted.shape
        error = np.abs(image.astype(int) - wanted).mean()
        assert error <= allowed + (channels == 1)  # one level: rounding of the luma
    assert capfd.readouterr() == ("", "")  # libjpeg's complaints


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_images(mode):
    data = encode(PILLOW.convert(mode), "PNG")
    np.testing.assert_array_equal(decode(data, 1), GREY)
    np.testing.assert_array_equal(decode(data, 3), GREY.repeat(3, axis=2))


def test_sixteen_bits_keep_their_upper_eight():
    deep = GREY[..., 0].astype(np.uint16) * 257
    data = encode(Image.fromarray(deep), "PNG")
    np.testing.assert_array_equal(decode(data, 1), GREY)
    np.testing.assert_array_equal(decode(data, 3), GREY.repeat(3, axis=2))


def with_orientation(value, kind, **options):
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(PILLOW, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_images_are_turned_by_their_exif_orientation(kind, value):
    data = with_orientation(value, kind, **({} if kind == "PNG" else {"quality": 95}))
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    stored = decode(data, 3)
    assert stored.shape == IMAGE.shape  # as TFDS does
    image = decode(data, 3, upright=True)
    assert image.flags["C_CONTIGUOUS"] and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= (3 if kind == "WEBP" else 0)
    asked = []

    def part(shape):
        asked.append(shape)
        return 9, 3, 20, 30

    np.testing.assert_array_equal(decode(data, 3, part, upright=True), image[9:29, 3:33])
    assert asked == [image.shape[:2]]
    np.testing.assert_array_equal(decode(data, 3, part), stored[9:29, 3:33])


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_changes_nothing(value):
    data = with_orientation(value, "JPEG")
    np.testing.assert_array_equal(decode(data, 3, upright=True), decode(data, 3))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([b"II*\0\x08\0\0\0\1\0\x12\1", b"MM\0*\0\0\0\x08\0\1\1\x12", b""]),
       st.binary(max_size=40))  # fmt: skip
def test_any_exif_has_an_orientation(start, rest):
    assert 1 <= headers.read_orientation(start + rest) <= 8


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(("kind", "size"), [(1, 1), (3, 2), (4, 4)])
def test_an_orientation_of_every_whole_type_and_order_of_bytes(order, kind, size):
    def number(value, length):
        return value.to_bytes(length, order)

    exif = (b"II" if order == "little" else b"MM") + number(42, 2) + number(8, 4) + number(2, 2)
    exif += number(0x010F, 2) + number(2, 2) + number(4, 4) + b"abc\0"
    exif += number(0x0112, 2) + number(kind, 2) + number(1, 4) + number(6, size) + bytes(4 - size)
    assert headers.read_orientation(exif) == 6


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["PNG", "JPEG"]), part=st.floats(0, 0.999))
def test_an_image_cut_short_is_refused(kind, part):
    data = encode(PILLOW, kind)
    with pytest.raises(ValueError, match=r"JPEG|PNG|image"):
        decode(data[: int(part * len(data))], 3)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=100))
def test_garbage_is_refused(data):
    with pytest.raises(ValueError, match=r"JPEG|PNG|image"):
        decode(data, 3)


@pytest.mark.parametrize(
    ("name", "classes", "channels"),
    [("digits", 10, 1), ("fashion_mnist", 10, 1), ("cifar10", 10, 3), ("imagenet2012", 1000, 3)],
)
def test_mock_images_have_the_real_classes_and_channels(tmp_path, name, classes, channels):
    reader = MockReader(*facts(find_builder(name, str(tmp_path)).info)[:2], (12, 20), True)
    assert (reader.classes, reader.channels) == (classes, channels)
    images, labels = zip(*map(reader.decode, range(64)), strict=True)
    again, _ = reader.decode(5)
    np.testing.assert_array_equal(again, images[5])
    assert {(i.shape, i.dtype) for i in images} == {((12, 20, channels), np.dtype(np.uint8))}
    assert max(labels) < classes
    assert list(tmp_path.iterdir()) == []


def test_mock_classes_can_be_told_apart(tmp_path):
    info = find_builder("cifar10", str(tmp_path)).info
    train, test = (MockReader(*facts(info)[:2], (16, 16), train) for train in (True, False))
    x, y = zip(*map(train.decode, range(50)), strict=True)
    means = np.stack(
        [np.mean([a for a, b in zip(x, y, strict=True) if b == k], 0) for k in range(10)]
    )
    held_out = [test.decode(i) for i in range(50)]
    found = [np.argmin(((means - image) ** 2).sum((1, 2, 3))) for image, _ in held_out]
    assert found == [label for _, label in held_out]
    assert not np.array_equal(train.decode(0)[0], test.decode(0)[0])
