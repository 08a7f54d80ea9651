# SPDX-License-Identifier: Apache-2.0
"""What evaluation sees of an image, compared with timm's transform (`golden/timm_preprocessing.py`)
and with Pillow."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

import localglobal_jax as lg
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.data.images import augment, device_ops, pipeline

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
TIMM = np.load(GOLDEN / "timm_preprocessing.npz")
IMAGES = [name.split("/")[1] for name in TIMM if name.startswith("image/")]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {
    "coatnet": dict(eval_crop=0.95, interpolation="bicubic"),
    "nano": dict(eval_crop=0.9, interpolation="bicubic"),
    "volo": dict(eval_crop=0.96, interpolation="bicubic"),
    "volo_448": dict(eval_crop=1.15, interpolation="bicubic"),
    "squash": dict(eval_crop="squash", interpolation="bicubic"),
    "bilinear": dict(eval_crop=0.875, interpolation="bilinear"),
    "oblong": dict(eval_crop=0.9, interpolation="bicubic", image_size=(64, 96)),
}


def options(**fields):
    return schema.Images(**{"image_size": (64, 64), "mean": MEAN, "std": STD, **fields})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("image", IMAGES)
def test_the_view_is_that_of_timm_within_one_level(image, case):
    ours = pipeline.for_evaluation(TIMM[f"image/{image}"], options(**CASES[case]))
    theirs = TIMM[f"view/{image}/{case}"]
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape and difference.max() <= 1
    assert np.mean(difference) < 0.01


@pytest.mark.parametrize("case", ["coatnet", "squash"])
def test_logits_are_those_after_timms_transform(case):
    golden = json.loads((GOLDEN / "coatnet_nano_rw.json").read_text())
    state = lg.convert.weights.read_safetensors(GOLDEN / "coatnet_nano_rw.safetensors")
    module, variables = lg.convert.timm.load(golden["cfg"], state, **golden["model_kwargs"])
    given, images = options(**CASES[case]), [TIMM[f"image/{name}"] for name in IMAGES]

    @jax.jit
    def logits_of(views):
        return module.apply(variables, device_ops.normalize(views, given), train=False)[0]

    logits = logits_of(np.stack([pipeline.for_evaluation(x, given) for x in images]))
    theirs = np.stack([TIMM[f"logits/{name}/{case}"] for name in IMAGES])
    np.testing.assert_allclose(logits, theirs, atol=2e-3 * np.abs(theirs).max())
    wrong = logits_of(np.stack([pipeline.for_evaluation(x, options()) for x in images]))
    assert np.abs(wrong - theirs).max() > 1e-2 * np.abs(theirs).max()  # the test can fail


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 3])),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    fraction=st.sampled_from([0.5, 0.875, 0.95, 1.0, 1.15, 2.0]),
    interpolation=st.sampled_from(["area", *augment.PILLOW]),
)
def test_any_image_gives_the_size_asked_for(shape, size, fraction, interpolation):
    image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    out = augment.center_crop(image, size, fraction, interpolation)
    assert out.shape == (*size, shape[2]) and out.dtype == np.uint8
    whole = augment.resize(image, size, interpolation)
    assert whole.shape == out.shape
    if interpolation != "area":
        how = Image.Resampling[interpolation.upper()]
        for i in range(shape[2]):
            expected = Image.fromarray(image[..., i]).resize(size[::-1], how)
            np.testing.assert_array_equal(whole[..., i], np.asarray(expected))


@pytest.mark.parametrize("interpolation", ["area", "bicubic"])
def test_a_crop_above_one_has_a_black_border(interpolation):
    image = np.full((40, 40, 3), 200, np.uint8)
    out = augment.center_crop(image, (40, 40), 1.25, interpolation)
    assert not out[:4].any() and not out[-4:].any() and not out[:, :4].any()
    assert (out[5:35, 5:35] == 200).all()


def test_a_very_long_image_takes_little_memory():
    image = np.zeros((1, 60_000, 3), np.uint8)
    image[:, 29_990:30_010] = 255
    out = augment.center_crop(image, (224, 224), 0.95, "bicubic")
    assert out.shape == (224, 224, 3) and out.all()


def test_training_and_evaluation_without_a_crop_see_the_same():
    """Of crop="none" and "pad", `eval_crop` and `interpolation` are those of training too."""
    image = TIMM["image/wide"]
    for crop in ("none", "pad"):
        given = options(crop=crop, eval_crop=0.95, interpolation="bicubic")
        np.testing.assert_allclose(
            pipeline.for_evaluation(image, given).astype(int), TIMM["view/wide/coatnet"], atol=1
        )


def test_defaults_are_those_before_the_fields_existed():
    image = TIMM["image/wide"]
    np.testing.assert_array_equal(
        pipeline.for_evaluation(image, options()), augment.resize(image, (64, 64))
    )
    np.testing.assert_array_equal(
        pipeline.for_evaluation(image, options(crop="resized")),
        augment.center_crop(image, (64, 64), 0.875),
    )


def test_squashing_is_said_once(caplog):
    said = []
    with caplog.at_level(logging.WARNING):
        for given in (options(dir="a"), options(dir="a"), options(dir="b")):
            pipeline.for_evaluation(TIMM["image/wide"], given)
            said.append(len(caplog.records))
        assert said == [1, 1, 2] and "data.eval_crop" in caplog.records[0].getMessage()
        caplog.clear()
        pipeline.for_evaluation(TIMM["image/same"], options(dir="c"))
        pipeline.for_evaluation(TIMM["image/wide"], options(dir="c", eval_crop="squash"))
        pipeline.for_evaluation(TIMM["image/wide"], options(dir="c", crop="resized"))
        assert not caplog.records


@pytest.mark.parametrize(
    ("text", "value"), [("0.95", 0.95), ("1", 1.0), ("squash", "squash"), ("None", None)]
)
def test_eval_crop_from_the_command_line(text, value):
    config = ConfigDict({"model": {"name": "coatnet_0"}})
    loading.override(config, "data.eval_crop", text)
    run = validation.check(config)
    assert isinstance(run.data, schema.Images) and run.data.eval_crop == value


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "nan", "inf", "squosh", "(0.9,)", "True"])
def test_wrong_crops_are_named(text):
    config = ConfigDict({"model": {"name": "coatnet_0"}})
    loading.override(config, "data.eval_crop", text)
    with pytest.raises(ValueError, match=r"data\.eval_crop"):
        validation.check(config)
