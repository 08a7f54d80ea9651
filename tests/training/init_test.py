# SPDX-License-Identifier: Apache-2.0
"""Weights that a run starts from are read by a run that starts, and by no other."""

import pathlib
import shutil

import pytest
import small

from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.inference import load

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/coatnet_digits.py") + ":size=tiny"
FIELDS = {**small.IMAGES, "data.mock": "True", "steps": "2", "optim.warmup_steps": "1"}
FIELDS |= {"eval.every": "0", "checkpoint.every": "1"}


def train(workdir, *words):
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return main(["train", "--config", CONFIG, "--workdir", str(workdir), *fields, *words])


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A folder with a run, and one that started from it and was stopped at step 1."""
    monkeypatch.chdir(tmp_path)
    assert train("first") == train("tuned", "--config.init=first") == 0
    shutil.rmtree("tuned/checkpoints/2")
    return tmp_path


def test_a_run_goes_on_without_the_weights_that_it_began_with(tuned, capsys):
    (tuned / "first").rename("elsewhere")
    assert train("tuned", "--config.init=first") == 0
    assert "resumed at step 1" in capsys.readouterr().err
    assert reader.steps("tuned") == [1, 2]
    assert train("other", "--config.init=first") == 2  # one that begins needs them
    assert "init=first" in capsys.readouterr().err and not (tuned / "other").exists()


@pytest.mark.parametrize("words", ["../first", "ABSOLUTE"])
def test_the_path_of_the_weights_is_the_same_from_another_folder(words, tuned, monkeypatch, capsys):
    (tuned / "below").mkdir()
    monkeypatch.chdir(tuned / "below")
    init = words.replace("ABSOLUTE", str(tuned / "first"))
    assert train("../tuned", f"--config.init={init}") == 0
    assert train("../tuned", "--config.init=../tuned") == 2  # other weights
    assert "init: " in capsys.readouterr().err
    assert main(["evaluate", "--workdir", "../tuned"]) == 0


def test_metadata_is_read_wherever_weights_are(tuned):
    assert main(["export", "first", "--out", "exported", "--format=safetensors"]) == 0
    places = ("first", "first/checkpoints", "first/checkpoints/2", "exported")
    models = [load.read_metadata(place)["model"] for place in places]
    assert all(model == models[0] for model in models) and models[0]["name"] == "coatnet"
    with pytest.raises(ValueError, match="nowhere"):
        load.read_metadata("nowhere")
