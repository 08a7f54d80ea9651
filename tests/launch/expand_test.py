# SPDX-License-Identifier: Apache-2.0
"""Expansion of a sweep: typed values, commands with the same values, errors that name the run."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localglobal_jax.cli.main import main, take_overrides
from localglobal_jax.config import loading, sweeps, validation
from localglobal_jax.launch import expand

ROOT = pathlib.Path(__file__).parents[2]
LAYOUTS = str(ROOT / "experiments/coatnet_layouts/sweep.py")
DIGITS = str(ROOT / "configs/coatnet_digits.py")
CONFIG = """
from ml_collections import ConfigDict
import numpy as np
from localglobal_jax.config.sweeps import product, zip_, chain

def get_config(arg=None):
    model = dict(name="coatnet", layout="CT", depths=(1, 1), widths=(16, 32))
    return ConfigDict(dict(model=model, optim=dict(learning_rate=1e-3), steps=10))
"""


def write(folder, body):
    file = folder / "some_runs.py"
    file.write_text(CONFIG + body)
    return str(file)


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "optim.learning_rate": st.floats(1e-30, 1e30),
            "model.depths": st.tuples(st.integers(0, 9), st.integers(0, 9)),
            "optim.schedule": st.sampled_from(["cosine", "constant"]),
            "data.dir": st.none() | st.just("/a b'c"),
            "checkpoint.best": st.none() | st.text("ab/ =\"'", min_size=1),
        }
    )
)
def test_what_a_command_says_is_what_the_sweep_means(overrides):
    run, applied, texts = expand.apply(DIGITS, {}, overrides)
    assert applied == overrides
    argv = [f"--config.{field}={text}" for field, text in texts.items()]
    _, read = take_overrides(argv)
    assert validation.check(loading.load(DIGITS, read)) == run


def test_values_become_what_their_fields_are():
    given = {"optim.learning_rate": 1, "steps": 1e3, "seed": np.int64(3), "model.depths": [2, 2]}
    run, applied, _ = expand.apply(DIGITS, {}, given)
    expected = {"optim.learning_rate": 1.0, "steps": 1000, "seed": 3, "model.depths": (2, 2)}
    assert applied == expected and repr(applied) == repr(expected)
    assert run.steps == 1000 and run.model["depths"] == (2, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def sweep():\n yield {'optim.lr': 1}", r"run 0 of sweep: .*optim\W+lr"),
        (
            "def sweep():\n yield {'seed': 0}\n yield {'seed': 'x'}",
            "(?s)run 1 of sweep: .*seed='x'",
        ),
        ("def sweep():\n yield {'steps': 1.5}", "config.steps=1.5"),
        ("def sweep():\n yield {'model': {}}", "config.model"),
        ("def sweep():\n yield {'model.layout': ('C', 'T')}", "config.model.layout="),
        ("def sweep():\n yield 3", "sweep .*3"),
        ("def sweep():\n yield {1: 2}", "sweep .*{1: 2}"),
        ("def sweep():\n return []", "sweep of .*some_runs.py"),
        ("def sweep():\n yield 1 / 0", "ZeroDivisionError"),
        ("def sweep_short():\n yield {}", 'some_runs.py.*"sweep".*sweep_short'),
        ("def sweep():\n yield from product({'seed': (1, 1)})", "001-.*000-.*seed=1"),
        ("def sweep():\n yield {'steps': 1}\n yield {'steps': 1.0}", "001-.*000-.*steps=1"),
    ],
)
def test_wrong_sweeps_are_exit_code_2_and_touch_nothing(body, message, tmp_path, capsys):
    file = write(tmp_path, body)
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=message):
        expand.expand(file, str(root))
    assert main(["sweep", "--config", file, "--workdir", str(root)]) == 2
    assert "localglobal sweep: " in capsys.readouterr().err
    assert not root.exists()


def test_overrides_of_the_command_line_hold_for_all(tmp_path):
    file = write(tmp_path, "def sweep_seeds():\n yield from product({'seed': range(2)})")
    found = expand.expand(file, str(tmp_path), "seeds", {"steps": "5"})
    assert found.base.steps == 5 and found.prefix == "some-runs-seeds"
    for i, described in enumerate(found.runs):
        assert described.run.steps == 5 and described.run.seed == i
        assert described.overrides == {"seed": i}
        assert described.workdir == f"{tmp_path}/{described.name}"
        assert described.arguments == (
            *("train", "--config", file, "--workdir", described.workdir),
            *("--config.steps=5", f"--config.seed={i}"),
        )
    with pytest.raises(ValueError, match=r"--config.seed"):
        expand.expand(file, str(tmp_path), "seeds", {"seed": "5"})


def test_a_sweep_that_grew_keeps_the_names_of_runs_that_are_there(tmp_path):
    body = "def sweep():\n yield from product({'seed': range(%d, 5)})"
    before = expand.expand(write(tmp_path, body % 3), str(tmp_path)).runs
    for described in before:
        pathlib.Path(described.workdir).mkdir()
    after = expand.expand(write(tmp_path, body % 2), str(tmp_path)).runs
    assert {d.name for d in before} < {d.name for d in after}
    assert after[0].name.startswith("some-runs-000-") and after[0].overrides == {"seed": 2}


def test_select():
    runs = expand.expand(LAYOUTS, "gs://bucket/x/").runs
    assert len(runs) == 54 and runs[3].workdir == f"gs://bucket/x/{runs[3].name}"
    digest = sweeps.digest(runs[7].overrides)
    chosen = expand.select(runs, ["3", f"*-{digest}", runs[1].name])
    assert [run.index for run in chosen] == [1, 3, 7]
    chosen = expand.select(runs, ["0-2", "52-999", "7-7"])
    assert [run.index for run in chosen] == [0, 1, 2, 7, 52, 53]
    for none in ("99", "54-60", "5-2"):
        with pytest.raises(ValueError, match=f"--only {none}"):
            expand.select(runs, [none])
