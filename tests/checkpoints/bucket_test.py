# SPDX-License-Identifier: Apache-2.0
"""A workdir in a bucket is as good as one on disk, for every family and every command.

The runs of ``tests/golden/workdirs/4f09b88``, saved on disk by an older version, are copied into a
bucket of a real server and resumed there, and beside it on disk.
"""

import json
import pathlib
import tarfile
import tempfile

import cv2
import gcs_server
import jax
import numpy as np
import pytest
from etils import epath

import localglobal_jax as lg
from localglobal_jax.checkpoints import objects, reader
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading
from localglobal_jax.training.reporting.run import of_the_machine

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdirs" / "4f09b88"
FAMILIES = ("coatnet", "focal", "muse", "volo")
LOCAL = f"{tempfile.gettempdir()}/localglobal-"  # of mirrors: no message names it


def put(directory, bucket):
    """Copies a directory into a bucket."""
    objects.upload(epath.Path(bucket), directory, objects.sizes(epath.Path(directory)))


def recorded(name, gcs, folder):
    """A run of the family `name` that stopped at step 4: on disk, and in a bucket."""
    with tarfile.open(GOLDEN / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    there = f"gs://{gcs_server.new_bucket(gcs)}/runs/{name}"
    put(folder / name, there)
    return folder / name, there


@pytest.fixture(scope="module", params=FAMILIES)
def resumed(request, gcs, tmp_path_factory):
    """A run of each family that was resumed, and is done: on disk, and in a bucket."""
    here, there = recorded(request.param, gcs, tmp_path_factory.mktemp("disk"))
    config = loading.read_json(here / "config.json")
    for directory in (here, there):
        lg.train(config, directory)
    return here, there


def lines_of(directory):
    text = (epath.Path(directory) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not of_the_machine(k)} for line in lines]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def test_parameters_and_metrics_are_those_of_the_disk_bit_for_bit(resumed):
    here, there = resumed
    (step, state, about), (step_there, state_there, about_there) = map(reader.read, resumed)
    assert step == step_there == 6
    same(state, state_there)
    assert lines_of(here) == lines_of(there) and lines_of(here)[-1]["step"] == 6
    assert about["metrics_crc32"] != 0 and about["config"] == about_there["config"]
    names = {path.name for path in here.iterdir()}
    assert {path.name for path in epath.Path(there).iterdir()} == names - {".lock"}
    assert {"model_card.md", "learning_curve.png"} <= names


def said(command, capsys):
    """Runs a command; returns its JSON. No message may name the local mirror."""
    capsys.readouterr()
    code = main([*command, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert LOCAL not in out + err
    return json.loads(out)


def test_evaluate_and_inspect(resumed, capsys):
    _, there = resumed
    found = said(["evaluate", f"--workdir={there}"], capsys)
    assert found["step"] == 6
    for line in lines_of(there):
        if line["step"] == 6 and line["split"] != "train":
            assert found[line["split"]] == pytest.approx(
                {k: v for k, v in line.items() if k not in ("step", "split")}, rel=1e-6
            )
    found = said(["inspect", there, "--verify"], capsys)
    assert found["directory"] == f"{there}/checkpoints"
    assert [step["verified"] for step in found["steps"]] == [True] * len(found["steps"])
    assert len(found["files"]) >= 2 and not any(file["error"] for file in found["files"])


def test_load(resumed):
    here, there = resumed
    (module, variables), (module_there, variables_there) = map(lg.load, resumed)
    assert module == module_there
    same(jax.device_get(variables), jax.device_get(variables_there))
    same(lg.load(f"{there}/checkpoints/6")[1], lg.load(f"{there}/checkpoints")[1])
    same(lg.load(there, step="best")[1], lg.load(here, step="best")[1])


@pytest.mark.parametrize("resumed", ["coatnet"], indirect=True)
def test_classify_and_report(resumed, tmp_path, capsys):
    _, there = resumed
    image, page = tmp_path / "one.png", tmp_path / "report.html"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    on_disk, in_bucket = (
        said(["classify", f"--workdir={directory}", str(image)], capsys) for directory in resumed
    )
    assert on_disk == in_bucket
    assert said(["report", there, f"--out={page}"], capsys)
    assert there in page.read_text() and LOCAL not in page.read_text()


def test_translate(gcs, tmp_path, capsys):
    text = tmp_path / "source.txt"
    text.write_text("b c a\nd a\n")
    on_disk, in_bucket = (
        said(["translate", f"--workdir={directory}", "--beam=1", str(text)], capsys)
        for directory in recorded("muse", gcs, tmp_path)
    )
    assert on_disk == in_bucket
