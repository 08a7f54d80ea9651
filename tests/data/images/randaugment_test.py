# SPDX-License-Identifier: Apache-2.0
"""RandAugment on the magnitude scales of the published codes, by value."""

import collections

import numpy as np
import pytest

from localglobal_jax.config import schema, validation
from localglobal_jax.data.images import pipeline, randaugment

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)


def levels(scale, name, magnitude, sign=1):
    """What the operation makes of every grey level."""
    out = randaugment.SCALES[scale][name](RAMP, magnitude / 10, sign)
    return out[..., 0].ravel().astype(int)


GREY = np.arange(256)


@pytest.mark.parametrize(
    ("scale", "name", "magnitude", "expected"),
    [
        # at the magnitude of CoAtNet's recipe
        ("own", "solarize", 15, 255 - GREY),
        ("tf", "solarize", 15, GREY),
        ("timm", "solarize", 10, 255 - GREY),
        ("own", "posterize", 15, GREY >> 6 << 6),
        ("tf", "posterize", 15, GREY >> 2 << 2),
        # at the one of VOLO's and Focal's
        ("timm", "posterize", 9, GREY >> 7 << 7),  # 4 - int(3.6) = 1 bit
        ("timm", "solarize", 9, np.where(GREY < 26, GREY, 255 - GREY)),  # 256 - int(230.4)
        ("tf", "solarize", 9, np.where(GREY < 230, GREY, 255 - GREY)),
        ("tf", "posterize", 9, GREY >> 5 << 5),
        ("timm", "solarize_add", 9, np.where(GREY < 128, GREY + 99, GREY)),
        ("tf", "solarize_add", 15, np.where(GREY < 128, GREY + 128, GREY)),
        ("timm", "invert", 9, 255 - GREY),
        ("tf", "invert", 0, 255 - GREY),
        # enhancements: brightness is a factor
        ("timm", "brightness", 10, np.minimum(np.rint(1.9 * GREY), 255)),
        ("tf", "brightness", 0, np.rint(0.1 * GREY)),
        ("tf", "brightness", 5, GREY),
        ("tf", "brightness", 15, np.minimum(np.rint(2.8 * GREY), 255)),
        ("tf", "posterize", 30, GREY),
    ],
)
def test_levels(scale, name, magnitude, expected):
    np.testing.assert_array_equal(levels(scale, name, magnitude), expected)


def test_timm_darkens_as_well_and_tf_does_not():
    np.testing.assert_array_equal(levels("timm", "brightness", 10, sign=-1), np.rint(0.1 * GREY))
    same = levels("tf", "brightness", 10, 1), levels("tf", "brightness", 10, -1)
    np.testing.assert_array_equal(*same)


def test_the_number_of_operations_of_each_code():
    sizes = {scale: len(table) for scale, table in randaugment.SCALES.items()}
    assert sizes == {"own": 14, "timm": 15, "tf": 16}
    assert "identity" not in randaugment.TIMM and "identity" not in randaugment.TF


def test_the_default_draws_as_before():
    """Two draws for each operation, and the same operations."""
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    for seed in range(40):
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        found = randaugment.randaugment(image, 2, 9, rng)
        expected = image
        for _ in range(2):
            operation = list(randaugment.OPERATIONS.values())[other.integers(14)]
            expected = operation(expected, 0.9, 1 if other.random() < 0.5 else -1)
        np.testing.assert_array_equal(found, expected)
        assert rng.random() == other.random()


def applied(monkeypatch, scale, magnitude, **options):
    """The strengths of 4,000 operations that are drawn, by name."""
    seen = collections.defaultdict(list)

    def spy(name):
        return lambda image, strength, sign: seen[name].append(strength) or image

    spies = {name: spy(name) for name in randaugment.SCALES[scale]}
    monkeypatch.setitem(randaugment.SCALES, scale, spies)
    monkeypatch.setattr(
        randaugment, "cutout", lambda image, strength, rng: spies["cutout"](image, strength, 1)
    )
    rng = np.random.default_rng(0)
    randaugment.randaugment(RAMP, 4000, magnitude, rng, scale=scale, **options)
    return seen


@pytest.mark.parametrize("scale", randaugment.SCALES)
def test_half_of_the_operations_with_noise(scale, monkeypatch):
    seen = applied(monkeypatch, scale, 9, probability=0.5, noise=0.5)
    assert seen.keys() == randaugment.SCALES[scale].keys()
    strengths = np.concatenate(list(seen.values()))
    assert len(strengths) == pytest.approx(2000, abs=110)
    assert 10 * strengths.mean() == pytest.approx(9, abs=0.05)
    assert 10 * strengths.std() == pytest.approx(0.5, abs=0.05)
    assert scale != "timm" or strengths.max() <= 1


def test_magnitudes_of_timm_end_at_ten(monkeypatch):
    seen = applied(monkeypatch, "timm", 15)
    assert {strength for values in seen.values() for strength in values} == {1.0}
    seen = applied(monkeypatch, "tf", 1, noise=3.0)
    assert min(strength for values in seen.values() for strength in values) == 0.0


@pytest.mark.parametrize("scale", randaugment.SCALES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 5, 3), (1, 1, 3)])
def test_any_image(scale, shape):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, shape, np.uint8)
    kept = image.copy()
    for magnitude in (0, 9, 15, 30):
        out = randaugment.randaugment(image, 30, magnitude, rng, scale=scale)
        assert out.shape == shape and out.dtype == np.uint8
    np.testing.assert_array_equal(image, kept)


def test_cutout_covers_a_square_of_the_share():
    image = np.zeros((224, 224, 1), np.uint8)
    out = randaugment.cutout(image, 0.5, np.random.default_rng(3))
    rows, columns = np.flatnonzero(out.any((1, 2))), np.flatnonzero(out.any((0, 2)))
    assert len(rows) <= 40 and len(columns) <= 40 and max(len(rows), len(columns)) == 40
    assert set(np.unique(out)) == {0, randaugment.FILL}


def test_the_fields_reach_the_batches(data_dir):
    """Batches are a function of the seed on each scale, and differ between the scales."""
    from localglobal_jax.data import loader

    found = {}
    for scale in randaugment.SCALES:
        options = schema.Images(
            dir=data_dir,
            randaugment_layers=2,
            randaugment_magnitude=9,
            randaugment_scale=scale,
            randaugment_probability=0.5,
            randaugment_noise=0.5,
        )
        source = pipeline.open_split(options, "train", train=True)
        whole = next(loader.train_batches(source, batch_size=8, seed=0, start=0, stop=1))["image"]
        halves = [
            next(loader.train_batches(source, batch_size=8, seed=0, start=0, stop=1, shard=(i, 2)))[
                "image"
            ]
            for i in range(2)
        ]
        np.testing.assert_array_equal(np.concatenate(halves), whole)
        found[scale] = whole
    assert not np.array_equal(found["own"], found["timm"])
    assert not np.array_equal(found["tf"], found["timm"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("randaugment_scale", "torch"),
        ("randaugment_probability", 0.0),
        ("randaugment_probability", 1.5),
        ("randaugment_noise", -1.0),
        ("randaugment_magnitude", 31),
    ],
)
def test_values_out_of_bounds(field, value):
    with pytest.raises(ValueError, match=rf"config\.data\.{field}"):
        validation.check({"model": {"name": "m"}, "data": {field: value}})
