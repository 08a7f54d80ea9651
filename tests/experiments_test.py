# SPDX-License-Identifier: Apache-2.0
"""Studies: what is committed is what make.py draws from results.csv; their sweeps are right."""

import importlib
import math
import pathlib

import pytest

from experiments import study
from localglobal_jax.launch import expand

FOLDER = pathlib.Path(study.__file__).parent
STUDIES = sorted(
    file.parent.name for file in FOLDER.glob("*/make.py") if "study.main" in file.read_text()
)
SWEEPS = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.glob("*/sweep*.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_committed_is_what_make_draws(name, tmp_path):
    made = importlib.import_module(f"experiments.{name}.make")
    study.main(made.__file__, made.tables, made.draw, tmp_path)
    for file in ("table.md", "README.md"):
        assert (tmp_path / file).read_text() == (FOLDER / name / file).read_text(), file
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("size", ["laptop", "paper", "tiny"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_is_right(name, size, tmp_path):
    runs = expand.expand(f"{FOLDER / name}:size={size}", str(tmp_path), "sweep", {})
    assert len({run.name for run in runs.runs}) == len(runs.runs) > 1


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert study.shown([]) == "not run"
    assert study.shown([1.5]) == "1.50"


def test_document_needs_its_marks():
    text = "a\n<!-- t -->\nold\n<!-- end -->\nb"
    assert study.document(text, {"t": ["new"]}) == "a\n<!-- t -->\nnew\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no <!-- u -->"):
        study.document(text, {"u": []})
