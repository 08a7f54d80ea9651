# SPDX-License-Identifier: Apache-2.0
"""Expansion of a sweep: typed values, commands with the same values, errors that name the run."""

import itertools
import pathlib
import re

import gcs_server
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
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


@settings(deadline=None)
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
        ("def sweep():\n yield 3", "sweep .*3"),
        ("def sweep():\n yield {1: 2}", "sweep .*{1: 2}"),
        ("def sweep():\n return []", "sweep of .*some_runs.py"),
        ("def sweep():\n yield 1 / 0", "ZeroDivisionError"),
        ("def sweep_short():\n yield {}", 'some_runs.py.*"sweep".*sweep_short'),
        ("", r"some_runs.py has no sweep: .*sweep\(\)"),
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


def test_a_packaged_config_is_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loading._log_packaged.cache_clear()
    command = ["sweep", "--config=coatnet_digits.py:size=tiny", "--sweep=layouts", "--dry_run"]
    assert main([*command, "--workdir=runs", "--only=0"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count(DIGITS) == 1
    assert re.search(r"^1 run .*\n1 model of [\d,]+ parameters$", printed.out, re.MULTILINE)


@pytest.mark.parametrize("root", ["", " "])
@pytest.mark.parametrize("words", [[], ["--sampler=tpe", "--trials=1"], ["--status"]])
def test_a_root_is_given(root, words, tmp_path, capsys, monkeypatch):
    """An unset variable of a shell would be the root of the file system."""
    monkeypatch.chdir(tmp_path)
    command = ["sweep", f"--config={DIGITS}", "--sweep=layouts", "--dry_run", f"--workdir={root}"]
    assert main([*command, *words]) == 2
    assert "--workdir is empty" in capsys.readouterr().err


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
    body = "def sweep():\n yield from product({'seed': (%s)})"

    def names(seeds):
        runs = expand.expand(write(tmp_path, body % seeds), str(tmp_path)).runs
        assert [d.index for d in runs] == [int(d.name.split("-")[2]) for d in runs]
        assert len({d.index for d in runs}) == len(runs)
        return {d.run.seed: d.name for d in runs}, [d.index for d in runs], runs

    before, _, runs = names("3, 4, 5")
    for described in runs:
        pathlib.Path(described.workdir).mkdir()
    after, numbers, runs = names("3, 7, 4, 9, 5")  # two are put in the middle
    assert {seed: after[seed] for seed in before} == before
    assert numbers == [0, 5, 1, 3, 2]
    assert [d.run.seed for d in expand.select(runs, ["5"])] == [7]
    pathlib.Path(runs[1].workdir).mkdir()  # started, and then another is put in front
    last, numbers, _ = names("1, 3, 7, 4, 9, 5")
    assert last[7] == after[7] and {seed: last[seed] for seed in before} == before
    assert numbers == [6, 0, 5, 1, 4, 2]
    less, _, _ = names("9, 5")  # and some are removed
    assert less[5] == before[5]


def test_a_sweep_that_grew_in_a_bucket(tmp_path, gcs, monkeypatch):
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    root = f"gs://{gcs_server.new_bucket(gcs)}/runs"
    body = "def sweep():\n yield from product({'seed': (%s)})"
    assert expand.expand(write(tmp_path, body % "3, 4"), root, look=True).runs[1].index == 1
    for described in expand.expand(write(tmp_path, body % "3, 4"), root).runs:
        (epath.Path(described.workdir) / "config.json").write_text("{}")
    runs = expand.expand(write(tmp_path, body % "3, 7, 4"), root, look=True).runs
    assert [(d.run.seed, d.index) for d in runs] == [(3, 0), (7, 3), (4, 1)]


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 30), min_size=1), st.dictionaries(st.integers(0, 40), st.integers(0, 9))
)
def test_numbers_are_unique_and_those_of_existing_runs_stay(digests, gaps):
    places = {place: f"{digest:08x}" for place, digest in enumerate(digests)}
    steps = itertools.accumulate(gap + 1 for gap in gaps.values())  # distinct
    there = {f"{digest:08x}": number for digest, number in zip(gaps, steps, strict=True)}
    found = expand.numbered(places, there)
    assert found.keys() == places.keys() and len(set(found.values())) == len(places)
    for place, number in found.items():
        known = there.get(places[place])
        assert number == known if known is not None else number not in there.values()


def test_equal_reasons_are_said_once(tmp_path):
    file = write(
        tmp_path, "def sweep():\n for seed in range(3):\n  yield {'seed': seed, 'stepz': 1}\n"
    )
    with pytest.raises(
        ValueError, match=r"(?s)^3 of 3 .*run 0 of sweep, .*run 2 of sweep: "
    ) as told:
        expand.expand(file, str(tmp_path / "r"))
    assert str(told.value).count("stepz") == 1


def test_layouts_may_be_swept_as_texts_and_tuples(tmp_path):
    file = write(
        tmp_path,
        "def sweep():\n for layout in ('CT', ('C', 'CT')):\n  yield {'model.layout': layout}\n",
    )
    runs = expand.expand(file, str(tmp_path / "r")).runs
    assert [run.run.model["layout"] for run in runs] == ["CT", ("C", "CT")]


def test_reasons_with_colons_stay_whole():
    invalid = [expand.Invalid(f"x-00{i} (mesh={{'data': {i}}})", f"{i}: too big") for i in (3, 5)]
    assert expand.all_of(invalid, 2).splitlines()[1:] == [": ".join(run) for run in invalid]


def test_the_check_of_training_says_equal_reasons_once(tmp_path, capsys):
    file = write(tmp_path, "def sweep():\n yield from product({'seed': (1, 2)})\n")
    command = ["sweep", "--config", file, "--workdir", str(tmp_path / "r"), "--config.data.mock=1"]
    assert main([*command, "--dry_run", "--config.optim.accumulate=3"]) == 2
    said = capsys.readouterr().err
    assert "2 of 2" in said and re.search(r"-000-.*, .*-001-.*: .*accumulate", said)


WRONG_SECOND = "def sweep():\n for seed in (0, -1, 2):\n  yield {'seed': seed}\n"


def test_a_run_that_is_chosen_and_wrong_is_said_to_be_wrong(tmp_path, capsys):
    file = write(tmp_path, WRONG_SECOND)
    command = ["sweep", "--config", file, "--workdir", str(tmp_path / "r"), "--dry_run"]
    assert main([*command, "--only", "1"]) == 2
    assert re.search(r"run 1 of sweep: .*\n.*seed=-1", capsys.readouterr().err)


def test_a_wrong_run_does_not_hide_the_state_of_the_others(tmp_path, capsys):
    command = ["sweep", "--config", write(tmp_path, WRONG_SECOND), "--workdir", str(tmp_path / "r")]
    assert main([*command, "--status"]) == 0
    printed = capsys.readouterr()
    assert "2 not started" in printed.out and "seed=-1" in printed.err


@pytest.mark.parametrize("body", ["import sys; sys.exit('gone')", "return 7", "return None"])
def test_a_function_that_is_no_sweep_is_an_error_of_the_config(body, tmp_path):
    file = write(tmp_path, f"def sweep():\n {body}\n")
    with pytest.raises(ValueError, match=r"sweep .*(gone|7|None)"):
        expand.expand(file, str(tmp_path / "r"))


def test_a_notice_that_all_runs_share_is_said_once(tmp_path, capsys):
    file = write(tmp_path, "def sweep():\n yield from product({'optim.momentum': (0.5, 0.9)})\n")
    command = ["sweep", "--config", file, "--workdir", str(tmp_path / "r"), "--config.data.mock=1"]
    assert main([*command, "--dry_run"]) == 0
    assert capsys.readouterr().err.count("notice   optim.momentum") == 1


def test_every_wrong_run_is_named(tmp_path, capsys):
    """Those that the schema refuses, twins, and those that only their shapes make wrong."""
    body = (
        "def sweep():\n yield {'seed': 0}\n yield {'seed': -1}\n yield {'seed': 0}\n"
        " yield {'steps': 0}\n yield {'checkpoint.best': 'test/nothing'}\n"
        " yield {'optim.lr': 1}\n yield {'model.layout': 'CTT'}\n"
    )
    file = write(tmp_path, body)
    with pytest.raises(ValueError, match=r"(?s)^4 of 7 .*seed=-1.*002-.*steps=0.*optim\W+lr"):
        expand.expand(file, str(tmp_path / "r"))
    command = ["sweep", "--config", file, "--workdir", str(tmp_path / "r"), "--config.data.mock=1"]
    assert main([*command, "--dry_run"]) == 2
    said = capsys.readouterr().err
    for word in ("6 of 7", "seed=-1", "002-", "steps=0", "test/nothing", "optim", "layout=CTT"):
        assert word in said
    assert said.count("seed=0") == 1


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
