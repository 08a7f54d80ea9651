# SPDX-License-Identifier: Apache-2.0
"""From a file of other people's weights to a checkpoint, and from a checkpoint to fine-tuning."""

import json
import pathlib

import jax
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "volo"
    arguments = json.loads((GOLDEN / "volo_aux.json").read_text())["kwargs"]
    command = ["convert", "timm", str(GOLDEN / "volo_aux.safetensors"), f"--out={out}"]
    command += ["--name=volo", f"--args={json.dumps(arguments)}"]
    assert main(command) == 0
    assert main(command) == 2  # not twice into one folder
    return out


def test_a_converted_file_loads_and_gives_the_references_logits(converted):
    module, variables = lg.load(converted)
    golden = np.load(GOLDEN / "volo_aux.npz")
    x = golden["input"].transpose(0, 2, 3, 1)
    logits, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    np.testing.assert_allclose(logits, golden["output"], atol=2e-5 * np.abs(golden["output"]).max())


def test_fine_tuning_starts_from_it_at_another_size_with_other_classes(converted, tmp_path, capsys):
    model = json.loads(next(converted.glob("checkpoints/0/metadata/metadata")).read_text())[
        "metadata"
    ]["model"]
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        f"    model = { ({**model, 'classes': 10})!r}\n"
        "    model = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}\n"
        "    del model['dtype'], model['classes']\n"
        f"    return ConfigDict(dict(steps=1, batch_size=2, model=model, init={str(converted)!r},\n"
        "        data=dict(name='cifar10', mock=True, image_size=(48, 80)),\n"
        "        optim=dict(learning_rate=1e-9, weight_decay=0.0), log=dict(tensorboard=False)))\n"
    )
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 0, (
        capsys.readouterr().err
    )
    (_, before), (module, after) = lg.load(converted), lg.load(tmp_path / "run")
    assert module.classes == 10
    assert after["params"]["position"].shape[:2] == (3, 5)
    for part in ("stem", "stage2"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            before["params"][part],
            after["params"][part],
        )
    assert main(["train", f"--config={config}", f"--workdir={tmp_path}/x", "--config.init=no"]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["timm", "missing.safetensors", "--out=x"], "no such file"),
        (["timm", str(GOLDEN / "volo_aux.json"), "--out=x", "--name=volo"], "well-formed"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--name=vollo"], "volo"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--args={"], "is not JSON"),
        (["timm", str(GOLDEN / "volo_aux.safetensors"), "--out=x", "--name=volo_d1_224"], "fit"),
    ],
)
def test_wrong_files_are_refused(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *command]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["coatnet", "volo", "focal"])
def test_a_description_builds_the_same_module(name):
    module = lg.create_model(name, drop_path=0.25)
    description = json.loads(json.dumps(lg.models.describe(module)))
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    assert lg.create_model(**tuples) == module


def test_models_prints_ours_beside_the_papers(capsys):
    names = ["coatnet_0", "volo_d1", "focal_tiny", "muse_iwslt", "transformer_iwslt"]
    assert main(["models", *names, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["parameters"] == 25_036_820
    assert rows[2]["parameters"] == 28_880_380
    assert rows[3]["parameters"] == rows[3]["paper_parameters"] - 9_216 == 48_184_368
    assert [row["image_size"] for row in rows] == [224, 224, 224, None, None]
    assert [row["lengths"] for row in rows] == [None, None, None, [32, 32], [32, 32]]
    for row in rows:
        assert abs(row["parameters"] / row["paper_parameters"] - 1) < 0.05
    assert main(["models", "coatnet_00"]) == 2
    assert main(["models", "coatnet_7", "transformer_base"]) == 0
    out = capsys.readouterr().out
    assert "2440 M" in out and "32+32" in out
