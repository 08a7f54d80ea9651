# SPDX-License-Identifier: Apache-2.0
"""data.channels: grey models on colour pictures, colour models on grey ones, by Pillow's rules."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import localglobal_jax as lg
from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.images.readers import decode

RNG = np.random.default_rng(0)
COLOURS = np.kron(RNG.integers(0, 256, (5, 6, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
ALPHA = RNG.integers(0, 256, (20, 24), np.uint8)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    return image


PILLOW = Image.fromarray(COLOURS)
KINDS = {
    "RGB": saved(PILLOW, "PNG"),
    "RGBA": saved(with_alpha("RGB"), "PNG"),
    "L": saved(PILLOW.convert("L"), "PNG"),
    "LA": saved(with_alpha("L"), "PNG"),
    "1": saved(PILLOW.convert("1"), "PNG"),
    "palette": saved(PILLOW.quantize(30), "PNG"),
    "palette, transparent": saved(PILLOW.quantize(30), "PNG", transparency=bytes(range(30))),
    "16 colours": saved(PILLOW.quantize(9), "PNG", bits=4),
    "16 bits": saved(Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257), "PNG"),
    "GIF": saved(PILLOW.quantize(30), "GIF"),
    "BMP": saved(PILLOW, "BMP"),
    "BMP, palette": saved(PILLOW.quantize(30), "BMP"),
    "WebP, RGBA": saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True),
    "JPEG": saved(PILLOW, "JPEG", quality=95),
    "JPEG, grey": saved(PILLOW.convert("L"), "JPEG"),
    "JPEG, CMYK": saved(PILLOW.convert("CMYK"), "JPEG", quality=95, subsampling=0),
    "JPEG, progressive": saved(PILLOW, "JPEG", progressive=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_colours_of_pillow(kind):
    data = KINDS[kind]
    image = Image.open(io.BytesIO(data))
    if kind == "palette, transparent":  # Pillow warns, unless through RGBA
        image = image.convert("RGBA")
    if kind == "16 bits":  # Pillow clips them
        image = Image.fromarray(COLOURS[..., 0])
    wide = {"JPEG, CMYK": 2}.get(kind, 0)
    for channels, mode in ((3, "RGB"), (1, "L")):
        wanted = np.array(image.convert("RGB").convert(mode)).reshape(20, 24, channels)
        found = decode(data, channels).astype(int)
        assert found.shape == wanted.shape
        # Luma: rounded once more; of a JPEG the stored one, of colours that RGB would clip.
        allowed = wide if channels == 3 else 1 + wide
        error = np.abs(found - wanted)
        assert error.max() <= allowed or (kind.startswith("JPEG") and error.mean() <= 1), (
            error.max()
        )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    for number, data in enumerate(KINDS.values()):
        for name in ("cat", "dog"):
            for split in ("train", "validation"):
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return root


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_set_in_another_number_of_channels(name, channels, data_dir):
    options = Images(
        name=name, dir=data_dir, mock=name == "cifar10", image_size=(8, 8), channels=channels
    )
    assert pipeline.describe(options) == (10, channels)
    source = pipeline.open_split(options, "test", train=False)
    image = source.batch(np.arange(4), None)["image"]
    assert image.shape == (4, 8, 8, channels)
    if name == "digits":
        native = options.model_copy(update={"channels": None})
        grey = pipeline.open_split(native, "test", train=False).batch(np.arange(4), None)["image"]
        np.testing.assert_array_equal(image, grey.repeat(channels, 3))


@pytest.fixture
def train(folder_config, pictures):
    """Trains two steps on the pictures; returns the exit code."""

    def train(workdir, *flags):
        given = ("--config", folder_config, f"--config.data.dir={pictures}", "--config.steps=2")
        return main(["train", *given, "--workdir", str(workdir), *flags])

    return train


GREY = ("--config.data.channels=1", "--config.data.mean=(0.5,)", "--config.data.std=(0.5,)")


# The way back, whose weights are tested in convert/adapt_test.py: with -m slow.
@pytest.mark.parametrize("ways", ["to grey", pytest.param("and back", marks=pytest.mark.slow)])
def test_grey_models_and_colour_weights(pictures, train, tmp_path, capsys, ways):
    """A grey run on colour pictures that begins with colour weights, and the way back."""
    colour, grey, back = (tmp_path / name for name in ("colour", "grey", "back"))
    assert train(colour) == 0
    assert train(grey, *GREY, f"--config.init={colour}") == 0
    assert "summed" in capsys.readouterr().err
    if ways == "and back":
        assert train(back, f"--config.init={grey}") == 0
        assert "repeated" in capsys.readouterr().err
    classifier = lg.load_classifier(grey)
    assert classifier.channels == 1
    for found in classifier.classify([pictures / "train" / "cat" / "0.png"]):
        assert not found.problem and len(found.best) == 2
    assert main(["evaluate", "--workdir", str(grey), "--json"]) == 0
    assert "validation" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_normalisation_by_three_values_of_one_channel_is_refused(train, tmp_path, capsys):
    flags = (GREY[0], "--config.data.mean=(0.485, 0.456, 0.406)")
    assert train(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert "data.mean" in said and "0.449" in said
