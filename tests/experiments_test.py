# SPDX-License-Identifier: Apache-2.0
"""Committed tables equal those that make.py draws from results.csv; every sweep is valid."""

import importlib
import math
import pathlib
import subprocess

import numpy as np
import pytest

from experiments import study
from experiments.benchmarks import make as benchmarks
from localglobal_jax.launch import expand

FOLDER = pathlib.Path(study.__file__).parent
STUDIES = sorted(
    file.parent.name for file in FOLDER.glob("*/make.py") if "study.main" in file.read_text()
)
SWEEPS = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.glob("*/sweep*.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_committed_tables_equal_those_of_make(name, tmp_path):
    made = importlib.import_module(f"experiments.{name}.make")
    study.main(made.__file__, made.tables, made.draw, tmp_path)
    for file in ("table.md", "README.md"):
        assert (tmp_path / file).read_text() == (FOLDER / name / file).read_text(), file
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_benchmarks_show_what_was_measured():
    page = FOLDER / "benchmarks" / "README.md"
    assert study.document(page.read_text(), benchmarks.tables()) == page.read_text()


@pytest.mark.parametrize("size", ["laptop", "paper", "tiny"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_is_right(name, size, tmp_path):
    runs = expand.expand(f"{FOLDER / name}:size={size}", str(tmp_path), "sweep", {})
    assert len({run.name for run in runs.runs}) == len(runs.runs) > 1


def test_one_command_makes_every_study():
    script = (FOLDER / "reproduce.sh").read_text()
    steps = [path for path in FOLDER.glob("*/measure*.py") if path.parent.name in STUDIES]
    steps += [path for path in FOLDER.glob("*/sweep*.py") if path.parent.name in STUDIES]
    for path in steps:
        name = path.parent.name
        said = (f"measure {name}.{path.stem}", f"sweep {name} {path.name}", f"{name}/{path.name}")
        assert any(words in script.replace('"', "") for words in said), path
    assert set(STUDIES) <= set(script.partition("for study in")[2].replace(";", " ").split())
    subprocess.run(["bash", "-n", FOLDER / "reproduce.sh"], check=True)


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    mean, half = study.interval([float(number) for number in range(11)])  # 10 degrees of freedom
    assert (mean, half) == (5.0, pytest.approx(2.228))
    assert study.shown([]) == "not run"
    assert study.shown([1.5]) == "1.50"


def test_ranked_says_what_is_certain():
    near, far = {"0": 1.0, "1": 1.1, "2": 0.9}, {"0": 3.0, "1": 3.1, "2": 2.9}
    same = {"0": 1.0, "1": 1.0, "2": 1.1}
    assert study.ranked({"a": near, "b": far, "c": same, "d": {}}) == "b > c ≈ a"
    assert (study.sign(near, far), study.sign(far, near)) == ("<", ">")
    assert study.ranked({"a": near, "b": {}}) == "not run"


def test_shifted_images_move_into_four_directions():
    shifted = importlib.import_module("experiments.beyond.measure").shifted
    image = np.zeros((5, 4, 6, 1), np.uint8)
    image[:, 1, 2] = 7
    np.testing.assert_array_equal(shifted(image, 0), image)
    found = [tuple(int(n) for n in np.argwhere(one)[0]) for one in shifted(image, 1)]
    assert found == [(2, 2, 0), (0, 2, 0), (1, 3, 0), (1, 1, 0), (2, 2, 0)]
    assert shifted(image, 2)[1].max() == 0  # over the edge, and not in again


def test_document_needs_its_marks():
    text = "a\n<!-- t -->\nold\n<!-- end -->\nb"
    assert study.document(text, {"t": ["new"]}) == "a\n<!-- t -->\nnew\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no <!-- u -->"):
        study.document(text, {"u": []})
