# SPDX-License-Identifier: Apache-2.0
"""How images are prepared goes with the weights: from their name, through `convert`, to every use.

A white pixel is [1, 1, 1] for 15 of timm's 16 published CoAtNets and CoAtNeXts, and
[2.249, 2.429, 2.640] for `coatnet_bn_0_rw_224` and all VOLOs.
"""

import functools
import json
import pathlib
import typing

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.checkpoints import manager
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, preprocessing, schema, validation
from localglobal_jax.convert import files
from localglobal_jax.data.images import device_ops
from localglobal_jax.inference import classifier
from localglobal_jax.models import registry

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PUBLISHED = json.loads((GOLDEN / "timm_preprocessing.json").read_text())
BLOCKS = {"T": {"head_width": 8}}
TINY = dict(layout="T", depths=(1,), widths=(16,), strides=(2,), blocks=BLOCKS)
TINY |= dict(stem=(8,), stem_stride=4)  # few tokens, as some names have 384 pixels


@functools.cache
def tiny(channels=3, classes=2):
    module = registry.create_model("coatnet", classes=classes, **TINY)
    x = jnp.zeros((1, 32, 32, channels))
    return module, jax.jit(lambda: module.init(jax.random.key(0), x, train=False))()


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """(name, *options) -> directory. The weights are those of a tiny model."""

    def of(name, *options, channels=3):
        module, variables = tiny(channels)
        monkeypatch.setitem(files.SOURCES, "timm", lambda *_: (module, variables))
        file = tmp_path / "weights" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.touch()
        out = tmp_path / name.replace("/", "_")
        assert main(["convert", "timm", str(file), f"--out={out}", *options]) == 0
        return out

    return of


def white(options):
    picture = np.full((1, 2, 2, 3), 255, np.uint8)
    return np.asarray(device_ops.normalize(jnp.asarray(picture), options))[0, 0, 0]


def test_there_are_sixteen_and_eleven():
    assert sum(name.startswith("coatne") for name in PUBLISHED) == 16
    assert sum(name.startswith("volo") for name in PUBLISHED) == 11


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_has_timms_values(name):
    theirs = preprocessing.of_hub(PUBLISHED[name])
    assert theirs.keys() == set(preprocessing.FIELDS)
    for spelling in (name, name.split(".")[0], f"timm/{name}", f"hf-hub:timm/{name}"):
        assert preprocessing.of_timm(spelling) == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_white_pixel_arrives_as_the_authors_saw_it(name, convert):
    out = convert(name)
    right = (1, 1, 1)
    if name.startswith(("coatnet_bn_0_rw_224", "volo")):
        right = (2.249, 2.429, 2.640)
    size, crop = PUBLISHED[name]["input_size"][1], PUBLISHED[name]["crop_pct"]
    crop = "squash" if PUBLISHED[name]["crop_mode"] == "squash" else crop
    configs = [f"{ROOT}/configs/{file}.py:init={out}" for file in ("finetune_folder",)]
    if name.startswith("coatnet_nano"):
        configs += [f"{ROOT}/configs/coatnet_finetune.py:init={out}"]
    for spec in configs:
        data = validation.check(loading.load(spec)).data
        np.testing.assert_allclose(white(data), right, atol=5e-4)
        assert (data.eval_crop, data.interpolation) == (crop, "bicubic")
    options = classifier.load(out).options
    np.testing.assert_allclose(white(options), right, atol=5e-4)
    assert (options.image_size, options.eval_crop) == ((size, size), crop)
    card = (out / "model_card.md").read_text()
    for field, value in preprocessing.of_timm(name).items():
        assert f"| {field} | {value} |" in card


def test_focal_is_prepared_as_swins_code_does(tmp_path):
    golden = json.loads((GOLDEN / "focal_tiny.json").read_text())
    weights = str(GOLDEN / "focal_tiny.safetensors")
    arguments = golden.get("kwargs") or golden["args"]
    report = files.convert_file("focal", weights, str(tmp_path / "f"), arguments=arguments)
    assert report["mean"] == (0.485, 0.456, 0.406) and report["eval_crop"] == 0.875


@pytest.mark.parametrize(("source", "name"), [("focal", "x"), ("timm", "coatnet_0_rw")])
def test_weights_without_a_size_are_those_of_224(source, name):
    _, variables = tiny()
    assert files.prepared(source, name, {}, variables)["image_size"] == (224, 224)


def test_the_size_of_a_volo_without_one_is_not_known():
    assert "image_size" not in files.prepared("timm", "volo", {}, tiny()[1])


def test_every_interpolation_has_a_name_of_timm():
    ours = typing.get_args(schema.Images.model_fields["interpolation"].annotation)
    assert sorted(preprocessing.INTERPOLATIONS.values()) == sorted(ours)
    for name, mode in preprocessing.INTERPOLATIONS.items():
        assert preprocessing.of_hub({"interpolation": name}) == {"interpolation": mode}


def test_a_hub_config_beside_the_file_wins(convert, tmp_path):
    (tmp_path / "weights").mkdir()
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 64]}
    own |= {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "center"}
    config = tmp_path / "weights" / "config.json"
    config.write_text(json.dumps({"architecture": "x", "pretrained_cfg": own}))
    options = classifier.load(convert("coatnet_0_rw_224")).options
    assert (options.mean, options.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert options.image_size == (96, 64)
    assert (options.eval_crop, options.interpolation) == (0.8, "bilinear")
    for text in ("{", "[]", '{"pretrained_cfg": 3, "mean": "x"}', '{"mean": [], "input_size": 3}'):
        config.write_text(text)
        out = convert(f"volo_d1_{200 + len(text)}")
        assert preprocessing.of_checkpoint(metadata(out))["eval_crop"] in (0.96, 1.15)


def metadata(out):
    return json.loads((out / "checkpoints/0/metadata/metadata").read_text())["metadata"]


def test_names_of_the_classes_of_a_file_or_of_the_hub(convert, tmp_path, capsys):
    (tmp_path / "names").write_text("dog\r\ncat\r\n", encoding="utf-8-sig")  # by Notepad
    out = convert("coatnet_0_rw_224", f"--labels={tmp_path / 'names'}")
    assert classifier.load(out).labels == ("dog", "cat")
    (tmp_path / "weights" / "config.json").write_text('{"label_names": ["a", "b"]}')
    assert classifier.load(convert("coatnet_1_rw_224")).labels == ("a", "b")
    (tmp_path / "weights" / "config.json").write_text('{"label_names": ["a"]}')
    assert classifier.load(convert("coatnet_2_rw_224")).labels == ()
    (tmp_path / "weights" / "config.json").write_text('{"label_names": ["crane", "crane"]}')
    assert classifier.load(convert("coatnet_3_rw_224")).labels == ()
    file = str(tmp_path / "weights" / "coatnet_2_rw_224.safetensors")
    for text in ("a\n", "a\na\n", "a\nb\nc\n"):
        (tmp_path / "names").write_text(text)
        given = [f"--out={tmp_path}/x", f"--labels={tmp_path / 'names'}"]
        assert main(["convert", "timm", file, *given]) == 2
        assert "--labels" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_ones_own_mean_is_given_to_convert(convert, capsys):
    out = convert("coatnet_0_rw_224", "--config.data.mean=(0.1, 0.2, 0.3)",
                  "--config.data.eval_crop=squash")  # fmt: skip
    options = classifier.load(out).options
    assert options.mean == (0.1, 0.2, 0.3) and options.eval_crop == "squash"
    assert options.std == (0.5, 0.5, 0.5)
    given = ["convert", "timm", "x.safetensors", "--out=x"]
    assert main([*given, "--config.data.flip=true"]) == 2
    assert "data.flip" in capsys.readouterr().err
    assert main([*given, "--config.data.std=(0,)"]) == 2
    assert "data.std" in capsys.readouterr().err


def test_an_unknown_preprocessing_is_said_and_asked_for(convert, tmp_path, capsys):
    out = convert("mine", "--name=mine")
    said = capsys.readouterr()
    assert "--config.data.mean" in said.err and "not known" in said.out
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((9, 9, 3), np.uint8))
    given = ["classify", f"--workdir={out}", str(tmp_path / "a.png")]
    assert main(given) == 2
    error = capsys.readouterr().err
    for field in ("image_size", "mean", "std"):
        assert f"--config.data.{field}" in error
    assert "mean='(0.5, 0.5, 0.5)'" in error and "eval_crop=0.95" in error
    given += [f"--config.data.{field}" for field in ("image_size=(32, 32)", "mean=0.5", "std=0.5")]
    assert main(given) == 0
    capsys.readouterr()
    train(tmp_path, f"--config.init={out}")
    said = capsys.readouterr().err
    assert "data.mean" in said and "not known" in said


def test_a_checkpoint_converted_before_is_known_by_its_name(tmp_path):
    module, variables = tiny()
    about = {"model": registry.describe(module)}
    about["converted"] = {"source": "timm", "name": "timm/coatnet_nano_rw_224.sw_in1k"}
    save(tmp_path / "old", variables, about)
    options = classifier.load(tmp_path / "old").options
    assert (options.mean, options.image_size) == ((0.5, 0.5, 0.5), (224, 224))
    spec = f"{ROOT}/configs/finetune_folder.py:init={tmp_path}/old"
    assert loading.load(spec).data.eval_crop == 0.9


def save(directory, variables, about):
    saved = manager.Checkpoints(directory / "checkpoints", schema.Checkpoints())
    saved.save(0, {"variables": variables}, metadata=about)
    saved.close()


@pytest.mark.parametrize(("name", "mean"), [("coatnet_0_rw_224", (0.5,)), ("volo_d1_224", None)])
def test_grey_weights_have_one_value_or_none(name, mean, convert):
    found = preprocessing.of_checkpoint(metadata(convert(name, channels=1)))
    assert found.get("mean") == mean and found["eval_crop"] in (0.95, 0.96)


# ---------------------------------------------------------------------------- conflicts


def train(directory, *options, code=0):
    config = directory / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        "    return ConfigDict(dict(steps=1, batch_size=2,\n"
        f"        model=dict(name='coatnet', **{TINY!r}),\n"
        "        data=dict(name='cifar10', mock=True, image_size=(32, 32)),\n"
        "        eval=dict(every=0), log=dict(tensorboard=False)))\n"
    )
    workdir = directory / f"run{len(list(directory.glob('run*')))}"
    assert main(["train", f"--config={config}", f"--workdir={workdir}", *options]) == code
    return workdir


def test_another_mean_than_the_checkpoints_is_said(convert, tmp_path, capsys):
    out = convert("coatnet_0_rw_224")
    train(tmp_path, f"--config.init={out}", "--config.data.mean=(0.485, 0.456, 0.406)")
    said = capsys.readouterr().err
    assert "data.mean=(0.5, 0.5, 0.5); now it is (0.485, 0.456, 0.406)" in said
    assert "data.std=(0.5, 0.5, 0.5)" not in said
    classifier.load(out, overrides={"data.std": "(0.2,)"})
    assert "data.std=(0.5, 0.5, 0.5); now it is (0.2,)" in capsys.readouterr().err
    classifier.load(out)
    assert "data." not in capsys.readouterr().err


def test_a_run_keeps_its_own_mean_everywhere(tmp_path, capsys):
    own = ("--config.data.mean=(0.1, 0.2, 0.3)", "--config.data.std=(0.4, 0.5, 0.6)")
    own += ("--config.data.eval_crop=0.9", "--config.data.interpolation=bilinear")
    run = train(tmp_path, *own)
    spec = f"{ROOT}/configs/finetune_folder.py:init={run}"
    data = validation.check(loading.load(spec)).data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (data.eval_crop, data.interpolation) == (0.9, "bilinear")
    options = classifier.load(run).options
    assert (options.mean, options.eval_crop) == ((0.1, 0.2, 0.3), 0.9)
    card = (run / "model_card.md").read_text()
    for text in ("| mean | (0.1, 0.2, 0.3) |", "| eval_crop | 0.9", "| interpolation | bilinear"):
        assert text in card
    capsys.readouterr()
    train(tmp_path, f"--config.init={run}", *own)
    assert "data.mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("crop", "seen"), [("resized", 0.875), ("none", "squash")])
def test_the_crop_of_a_run_that_did_not_say_one(crop, seen):
    data = {"mean": [0.5], "std": [0.5], "crop": crop, "image_size": [8, 8], "eval_crop": None}
    found = preprocessing.of_checkpoint({"config": {"data": data}})
    assert found["eval_crop"] == seen and found["interpolation"] == "area"
    assert preprocessing.of_checkpoint({"model": {}}) == {}
