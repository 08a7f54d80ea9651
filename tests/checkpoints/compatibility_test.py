# SPDX-License-Identifier: Apache-2.0
"""Workdirs that earlier commits wrote restore, evaluate and resume.

Commit e1ceab9 came before two options were renamed, 4f09b88 before the package was ordered.
``tests/golden/workdirs/COMMIT/NAME.tar.gz`` holds a mock run of 6 steps, one per family, as it is
on disk if it ends between steps 4 and 6: ``config.json``, ``metrics.jsonl``, step 4 of
``checkpoints``, the tokenizer. ``NAME.finished.jsonl`` beside it has the metrics of the whole run.
"""

import json
import logging
import pathlib
import tarfile

import jax
import pytest

import localglobal_jax as lg
from localglobal_jax.checkpoints import reader
from localglobal_jax.cli import main
from localglobal_jax.config import loading
from localglobal_jax.models import registry

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdirs"
FAMILIES = {
    "coatnet": "CoAtNet",
    "focal": "FocalTransformer",
    "muse": "EncoderDecoder",
    "volo": "VOLO",
}
EXAMPLES = {"focal": (64, 64, 1), "volo": (32, 32, 1), "coatnet": (8, 8, 1)}


COMMITS = ("4f09b88", "e1ceab9")


@pytest.fixture(params=[f"{commit}/{family}" for commit in COMMITS for family in FAMILIES])
def workdir(request, tmp_path):
    with tarfile.open(GOLDEN / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param.partition("/")[2]


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def as_today(line, workdir):
    """Returns the metrics of a line under their names of today, without those defined anew since.

    Translation: at commit e1ceab9 `loss` was the `nll`, and BLEU and chrF were of other tokens.
    """
    if workdir.name == "muse" and "nll" not in line:
        line = {"nll" if name == "loss" else name: value for name, value in line.items()}
        line = {k: v for k, v in line.items() if not k.startswith(("bleu", "chrf"))}
    return line


def leaves_of(tree):
    return {
        "/".join(key.key for key in path): (leaf.shape, leaf.dtype.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_parameters_are_those_that_the_model_makes_today(workdir):
    module, variables = lg.load(workdir)
    assert type(module).__name__ == FAMILIES[workdir.name]
    if shape := EXAMPLES.get(workdir.name):
        inputs = (jax.ShapeDtypeStruct((1, *shape), "float32"),)
    else:
        inputs = (jax.ShapeDtypeStruct((1, 8), "int32"),) * 2
    made = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, train=False), *inputs)
    assert leaves_of(variables) == leaves_of(made)

    (step,) = reader.inspect(workdir)["steps"]
    prefix = "variables/"
    recorded = {
        path.removeprefix(prefix): tuple(about["shape"])
        for path, about in step["leaves"].items()
        if path.startswith(prefix)
    }
    assert recorded == {path: shape for path, (shape, _) in leaves_of(variables).items()}


def test_evaluation_gives_the_recorded_metrics(workdir):
    step, metrics = lg.evaluate(workdir)
    recorded = [line for line in lines_of(workdir) if line["split"] != "train"]
    assert step == 4
    assert {line["split"] for line in recorded} == set(metrics)
    for line in (as_today(line, workdir) for line in recorded):
        found = {"step": step, "split": line["split"], **metrics[line["split"]]}
        assert {"loss", "nll"} & line.keys() <= found.keys()
        for name, value in line.items():
            assert found[name] == (value if name == "split" else pytest.approx(value, rel=3e-5))


def test_training_resumes(workdir, caplog):
    before = (workdir / "metrics.jsonl").read_bytes()
    finished = workdir.parent / f"{workdir.name}.finished.jsonl"
    expected = json.loads(finished.read_text().splitlines()[-1])
    config = loading.read_json(workdir / "config.json")
    with caplog.at_level(logging.INFO, logger="localglobal_jax"):
        results = lg.train(config, workdir)
    assert "resumed at step 4" in caplog.text
    assert (workdir / "metrics.jsonl").read_bytes().startswith(before)
    last = lines_of(workdir)[-1]
    assert last["step"] == expected["step"] == 6
    assert results[last["split"]]["loss"] == last["loss"]
    expected = as_today(expected, workdir)
    name = "loss" if "loss" in expected else "nll"
    assert last[name] == pytest.approx(expected[name], rel=1e-4)  # two devices here, one there
    assert reader.steps(workdir)[-1] == 6


def test_inspect_verifies_the_files(workdir, capsys):
    assert main.main(["inspect", str(workdir), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["verified"] for step in found["steps"]] == [True]
    assert not any(file["error"] for file in found["files"])


def test_every_family_has_a_workdir():
    for commit in COMMITS:
        stored = {path.name.removesuffix(".tar.gz") for path in (GOLDEN / commit).glob("*.tar.gz")}
        assert stored == set(FAMILIES)
    models = {type(registry.create_model(name)).__name__ for name in registry.list_models()}
    assert set(FAMILIES.values()) == models
