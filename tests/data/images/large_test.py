# SPDX-License-Identifier: Apache-2.0
"""JPEGs of more pixels than allowed are decoded at a reduced scale, in bounded memory."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from localglobal_jax.config.schema import Images
from localglobal_jax.data.images import files, jpeg, pipeline, readers

BOUND = 100_000_000  # OPENCV_IO_MAX_IMAGE_PIXELS of the package


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def tall(width, rows, strip):
    """A JPEG of `rows` strips of 16 rows, each an interval between two restart markers.

    Only one strip is encoded, so that a large picture takes neither time nor memory to make.
    """
    unit = Image.fromarray(np.broadcast_to(strip, (16, width, 3)))
    data = encode(unit, restart_marker_rows=1, subsampling="4:2:0")
    found = jpeg.parse(data)
    scan = found.scans[0]
    header = jpeg.with_height(data, found.frame, 16 * rows)[: scan.start]
    interval = data[scan.start : scan.end]
    parts = [interval + bytes([0xFF, 0xD0 + i % 8]) for i in range(rows - 1)]
    return b"".join([header, *parts, interval, b"\xff\xd9"])


GRADIENT = np.linspace(0, 255, 12_000).astype(np.uint8)[None, :, None]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of 120 megapixels, brighter to the right."""
    path = tmp_path_factory.mktemp("large") / "train" / "cat" / "large.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(tall(12_000, 625, GRADIENT))
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_half_the_sides_above_the_bound(picture, channels):
    image = readers.decode(picture.read_bytes(), channels)
    assert image.shape == (5_000, 6_000, channels)
    expected = GRADIENT[0, ::2, 0].astype(int)
    assert np.abs(image[::499, :, 0].astype(int) - expected).max() <= 3
    part = readers.decode(
        picture.read_bytes(), channels, lambda shape: (9, 7, *(s // 2 for s in shape))
    )
    np.testing.assert_array_equal(part, image[9:2509, 7:3007])


def test_the_memory_of_a_large_picture(picture):
    """A half of the sides: 90 MB of pixels, not 360. What is measured is the peak of a process."""
    code = (
        "import re, sys\n"
        "from localglobal_jax.data.images import readers\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status())[1])\n"
        "before = peak()\n"
        "readers.decode(data, 3)\n"
        "print((peak() - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 40 <= int(done.stdout) <= 150  # MB


def test_training_and_classify_take_it(picture):
    (picture.parents[1] / "dog").mkdir(exist_ok=True)
    options = Images(name="folder", dir=str(picture.parents[2]), image_size=(8, 8), crop="resized")
    source = pipeline.open_split(options, "train", train=True)
    assert len(source) == 1 and not source.bad
    assert files.read(str(picture), 3).shape == (5_000, 6_000, 3)


def damaged_size(height, width, **options):
    data = encode(Image.new("RGB", (64, 64)), **options)
    frame = jpeg.parse(data).frame
    return data[: frame.at] + struct.pack(">HH", height, width) + data[frame.at + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        damaged_size(65_500, 65_500),
        damaged_size(65_500, 65_500, progressive=True),
        damaged_size(9_000, 9_000),
    ],
    ids=["sequential", "progressive", "below the bound"],
)
def test_a_bomb_is_refused_before_it_is_decoded(data):
    with pytest.raises(ValueError, match=r"at least \d+ bytes"):
        readers.decode(data, 3)


def test_what_cannot_be_reduced_is_refused_with_the_variable():
    """A progressive JPEG is held as a whole, as coefficients, whatever its scale."""
    data = damaged_size(20_000, 20_000, progressive=True)
    found = jpeg.parse(encode(Image.new("RGB", (64, 64)), progressive=True))
    large = found._replace(frame=found.frame._replace(height=20_000, width=20_000))
    with pytest.raises(ValueError, match=readers.MAX_PIXELS):
        readers._divisor(large)
    fits = found._replace(frame=found.frame._replace(height=11_000, width=11_000))
    assert readers._divisor(fits) == 2
    end = b"\xff\xd9"
    with pytest.raises(ValueError, match=readers.MAX_PIXELS):
        first = jpeg.parse(encode(Image.new("RGB", (64, 64)), progressive=True)).scans[0]
        readers.decode(data[: first.end] + bytes(10_000_000) + data[first.end : -2] + end, 3)


def test_a_bomb_is_a_bad_record_that_may_be_tolerated(tmp_path):
    for name in ("cat", "dog"):
        for i in range(3):
            path = tmp_path / "train" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(Image.new("RGB", (20, 20))))
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(damaged_size(65_500, 65_500))
    options = Images(name="folder", dir=str(tmp_path), image_size=(8, 8), max_bad_records=1)
    assert pipeline.open_split(options, "train", train=True).bad == {1}
    with pytest.raises(ValueError, match=r"cat/1.jpg"):
        pipeline.open_split(options.model_copy(update={"max_bad_records": 0}), "train", train=True)
