# SPDX-License-Identifier: Apache-2.0
"""Searches: Optuna's draws as named runs, killed and resumed, stopped by successive halving.

The children are stand-ins that write what a run writes, in a second; `-m slow` has real ones.
"""

import csv
import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, sweeps
from localglobal_jax.launch import pool, search, status

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"""
from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import choice, integers, uniform

def get_config(arg=None):
    config = loading.load({str(ROOT / "configs/coatnet_digits.py")!r} + ":size=tiny,data=mock")
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.data.eval_splits = ("test[:8]",)
    config.checkpoint.best = "-test[:8]/loss"
    config.steps, config.batch_size, config.optim.warmup_steps = 40, 4, 1
    config.eval.every = 10
    return config

def search():
    return {{
        "optim.learning_rate": uniform(1e-4, 1e-1, log=True),
        "optim.accumulate": integers(1, 2),
        "optim.schedule": choice("cosine", "constant"),
    }}

def search_wrong():
    return {{"batch_size": integers(0, 1)}}

def search_none():
    return {{"seed": [1, 2]}}

def search_text():
    return {{"optim.learning_rate": uniform("1e-4", 1e-2)}}

def search_exits():
    raise SystemExit("no space")
"""
# The loss is the distance of the rate from 0.01, in decades; every evaluation takes 0.2 s. With
# eval.patience the run stops at step 20: its loss does not change. If SLOW is set, a bad run waits
# until the study has its first loss, and then SLOW seconds in which it may be pruned.
RUN = """
import json, math, os, pathlib, signal, sys, time
rate, folder, steps = float(sys.argv[1]), pathlib.Path(sys.argv[2]), 40
patience = json.loads(sys.argv[3])["eval"]["patience"]
steps = 20 if patience else steps
signal.signal(signal.SIGTERM, lambda *_: os._exit(42))
(folder / "config.json").write_text(sys.argv[3])
for step in range(10, steps + 1, 10):
    time.sleep(0.2)
    line = {"step": step, "split": "test[:8]", "loss": abs(math.log10(rate) + 2)}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    if step == 10 and line["loss"] > 0.3 and "SLOW" in os.environ:
        while str(line["loss"]) not in (folder.parent / "c-search.optuna").read_text():
            time.sleep(0.05)
        time.sleep(float(os.environ["SLOW"]))
done = folder / "checkpoints" / str(steps)
(done / "metadata").mkdir(parents=True)
stopped = {"metric": "-test[:8]/loss", "best": 0.0, "step": 10, "waited": patience}
metadata = {"early_stopping": stopped} if patience else {}
(done / "metadata" / "metadata").write_text(json.dumps({"metadata": metadata}))
(done / "files.json").touch()
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return str(tmp_path / "c.py")


@pytest.fixture
def stand_ins(monkeypatch):
    stand_in(monkeypatch)


def stand_in(monkeypatch):
    def job(run):
        from localglobal_jax.config import loading

        words = (str(run.run.optim.learning_rate), run.workdir, loading.to_json(run.run))
        command = (sys.executable, "-c", RUN, *words)
        return pool.Job(run.name, command, pathlib.Path(run.workdir), *pool.progress(run))

    monkeypatch.setattr(search.local, "job", job)


def command(file, root, *words):
    return ["sweep", f"--config={file}", f"--workdir={root}", "--sampler=tpe", *words]


def rows(capsys, words):
    assert main([*words, "--summary", "--format=csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_trials_are_named_runs_and_more_can_follow(file, tmp_path, stand_ins, capsys):
    words = command(file, tmp_path / "r")
    assert main([*words, "--trials=3", "--slots=2"]) == 0
    assert "3 of 3 done" in capsys.readouterr().err
    found = rows(capsys, words)
    assert [row["run"] for row in found] == ["0", "1", "2"] and {r["state"] for r in found} == {
        "done"
    }
    rates = [float(row["optim.learning_rate"]) for row in found]
    assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    folders = sorted(p.name for p in (tmp_path / "r").iterdir() if p.is_dir())
    assert [name.rsplit("-", 1)[0] for name in folders] == [f"c-search-00{i}" for i in range(3)]
    assert main([*words, "--trials=5"]) == 0
    assert "5 of 5 done" in capsys.readouterr().err
    more = rows(capsys, words)
    assert more[:3] == found and len({row["optim.learning_rate"] for row in more}) == 5
    assert main([*words, "--trials=5"]) == 0
    assert "5 of 5 done" in capsys.readouterr().err
    best = rows(capsys, [*words, "--sort=best", "--top=1"])[0]
    study = search.Study(search.read_space(file, str(tmp_path / "r"), "sweep", {}))._study
    assert study.best_trial.number == int(best["run"])


def test_a_killed_search_goes_on_with_the_same_runs(file, tmp_path, stand_ins, capsys):
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    study = search.Study(space, "random", 3)
    first = study.next_job()  # and the launcher is killed here
    words = command(file, tmp_path / "r", "--trials=3")
    assert main(words) == 0
    names = sorted(p.name for p in (tmp_path / "r").iterdir() if p.is_dir())
    assert first.name in names and len(names) == 3
    assert {row["state"] for row in rows(capsys, words[:-1])} == {"done"}


def test_a_study_whose_last_line_is_torn_goes_on(file, tmp_path):
    """As after a full disk. Damage elsewhere is named, and nothing is lost."""
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    study = search.Study(space, "random", 9)
    first = [study.draw().name for _ in range(2)]
    journal = tmp_path / "r" / "c-search.optuna"
    whole = journal.read_bytes()
    for torn in (whole[:-10], whole[:-1], whole + b"\0" * 50, whole + b'{"op_code": 4, "wor'):
        journal.write_bytes(torn)
        study = search.Study(space, "random", 9)
        assert [run.name for run in study.sweep().runs] == first[: 1 + (len(torn) > len(whole))]
        assert study.draw() and study.draw()
    damaged = whole.replace(b"{", b"(", 2)
    journal.write_bytes(damaged)
    for trials in (0, 9):
        with pytest.raises(ValueError, match=r"c-search\.optuna: line 1 "):
            search.Study(space, "random", trials)
    assert journal.read_bytes() == damaged


def test_a_study_is_read_without_writing(file, tmp_path):
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    run = search.Study(space, "random", 1).draw()
    journal = tmp_path / "r" / "c-search.optuna"
    for text in (journal.read_bytes(), journal.read_bytes() + b"{"):
        journal.write_bytes(text)
        assert [r.name for r in search.Study(space).sweep().runs] == [run.name]
        assert journal.read_bytes() == text


def test_successive_halving_prunes_and_ends_with_0(file, tmp_path, stand_ins, capsys, monkeypatch):
    monkeypatch.setenv("SLOW", "2")
    monkeypatch.setattr(pool, "LOOK", 0.1)
    words = command(file, tmp_path / "r")
    began = time.monotonic()
    monkeypatch.setattr(search, "FACTOR", 2)
    assert main([*words, "--trials=8", "--halving", "--slots=2", "--sampler=random"]) == 0
    assert time.monotonic() - began < 300
    said = capsys.readouterr().err
    states = [row["state"] for row in rows(capsys, words)]
    assert states.count("pruned") >= 1 and set(states) == {"done", "pruned"}
    assert f"{states.count('pruned')} pruned" in said.splitlines()[-1]
    assert main([*words, "--trials=8", "--halving"]) == 0  # pruned ones are not started again
    assert [row["state"] for row in rows(capsys, words)] == states


def test_halving_beside_patience(file, tmp_path, stand_ins, capsys, monkeypatch):
    """A run that patience stopped is done, with its best value; it is in no later rung."""
    monkeypatch.setenv("SLOW", "2")
    monkeypatch.setattr(pool, "LOOK", 0.1)
    monkeypatch.setattr(search, "FACTOR", 2)  # rungs at 10, 20 and 40 steps
    words = [*command(file, tmp_path / "r"), "--config.eval.patience=1", "--sampler=random"]
    assert main([*words, "--trials=5", "--halving", "--slots=2"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    found = rows(capsys, words)
    states = [row["state"] for row in found]
    assert set(states) == {"done", "pruned"} and len(states) == 5
    counted = f"{states.count('done')} of 5 done, 0 failed, {states.count('pruned')} pruned"
    assert last == counted
    assert {row["steps"] for row in found if row["state"] == "done"} == {"20/20"}
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {"eval.patience": "1"})
    for trial, row in zip(search.Study(space)._study.trials, found, strict=True):
        assert trial.state.name == {"done": "COMPLETE", "pruned": "PRUNED"}[row["state"]]
        if row["state"] == "done":
            assert trial.value == float(row["best test[:8]/loss"])
            assert {"completed_rung_0", "completed_rung_1"} <= trial.system_attrs.keys()
        assert "completed_rung_2" not in trial.system_attrs
    assert main([*words, "--trials=5", "--halving"]) == 0  # nothing starts, all are counted
    assert capsys.readouterr().err.splitlines() == [counted]


def test_every_evaluation_is_a_rung_of_its_own(file, tmp_path, monkeypatch):
    """However many there are at a look; NaN is given up."""
    monkeypatch.setattr(search, "FACTOR", 2)
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    study = search.Study(space, "random", 3, halving=True)
    jobs = [study.next_job() for _ in range(3)]
    for job, losses in zip(jobs, ([1, 3], [2, 0.5], [0.1, "nan"]), strict=True):
        job.directory.mkdir()
        lines = [{"step": 10 * i, "split": "test[:8]", "loss": x} for i, x in enumerate(losses, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (job.directory / "metrics.jsonl").write_text(text)
    # the second is worse than the first after 10 steps: what it has after 20 comes too late
    assert [study.gives_up(job) for job in jobs] == [False, True, True]


def test_two_starters_share_the_trials_and_count_all(file, tmp_path, stand_ins, capsys):
    """The second finds a trial that the first has pruned, and one that it has drawn."""
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    other = search.Study(space, "random", 3)
    pruned, running = other.next_job(), other.next_job()
    pruned.directory.mkdir()
    event = {"event": pool.PRUNED, "step": 10, "time": time.time()}
    (pruned.directory / "attempts.jsonl").write_text(json.dumps(event) + "\n")
    words = command(file, tmp_path / "r", "--trials=3")
    assert main(words) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "2 of 3 done, 0 failed, 1 pruned"
    assert not any(line.startswith(f"start    {pruned.name}") for line in said)
    assert any(line.startswith(f"done     {running.name}") for line in said)
    assert other.next_job() is None and other.states() == ["pruned", "done", "done"]


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_every_sampler_draws_from_the_space(sampler, file, tmp_path, capfd):
    space = search.read_space(file, str(tmp_path / "r"), "sweep", {})
    drawn = []
    for trials in (3, 6):  # and goes on after a restart, with other values
        study = search.Study(space, sampler, trials)
        drawn += [study.draw().run.optim for _ in range(3)]
    assert len({optim.learning_rate for optim in drawn}) == 6
    assert all(1e-4 <= optim.learning_rate <= 1e-1 for optim in drawn)
    assert {optim.accumulate for optim in drawn} <= {1, 2}
    assert {optim.schedule for optim in drawn} <= {"cosine", "constant"}
    assert capfd.readouterr() == ("", "")


def test_invalid_draws_are_left_out_and_said(file, tmp_path, stand_ins, capsys):
    words = [*command(file, tmp_path / "r"), "--sweep=wrong"]
    study = search.Study(search.read_space(file, str(tmp_path / "r"), "wrong", {}), "random", 9)
    drawn = [study.draw() for _ in range(9)]
    kept = [run for run in drawn if run]
    assert {run.run.batch_size for run in kept} == {1}
    reasons = [
        t.user_attrs[search.WRONG] for t in study._study.trials if search.WRONG in t.user_attrs
    ]
    assert len(reasons) + len(kept) == 9 and all("batch_size" in reason for reason in reasons)
    assert study.left_out() == reasons and len(study.states()) == len(kept)
    assert main([*words, "--trials=0"]) == 2
    assert "--trials" in capsys.readouterr().err


def test_trials_that_are_refused_run_at_the_next_start(file, tmp_path, monkeypatch, capsys):
    """Such as before their data are prepared."""

    def refused(run):
        code = "import sys; print('localglobal train: no data'); sys.exit(2)"
        command = (sys.executable, "-c", code)
        return pool.Job(run.name, command, pathlib.Path(run.workdir), *pool.progress(run))

    words = command(file, tmp_path / "r", "--trials=4")
    with monkeypatch.context() as patch:
        patch.setattr(search.local, "job", refused)
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "3 failed" in said and "the same command goes on" in said
    stand_in(monkeypatch)
    assert main(words) == 0
    assert "4 of 4 done, 0 failed" in capsys.readouterr().err


def test_a_trial_that_alone_is_refused_has_failed(file, tmp_path, monkeypatch, capsys):
    """Such as one whose batch does not divide; the others go on, and it is not tried again."""
    stand_in(monkeypatch)
    job, tried = search.local.job, []

    def some(run):
        made = job(run)
        if run.index != 1:
            return made
        tried.append(run.index)
        return dataclasses.replace(made, command=(sys.executable, "-c", "raise SystemExit(2)"))

    monkeypatch.setattr(search.local, "job", some)
    for trials in (3, 4):
        assert main(command(file, tmp_path / "r", f"--trials={trials}")) == 1
        assert f"{trials - 1} of {trials} done, 1 failed" in capsys.readouterr().err
    assert tried == [1]


def test_listed_numbers_keep_all_their_digits(file, tmp_path, capsys):
    text = CONFIG.replace("uniform(1e-4, 1e-1, log=True)", "choice(2**-10, 2**-11)")
    pathlib.Path(file).write_text(text)
    assert main(command(file, tmp_path / "r", "--trials=1", "--dry_run")) == 0
    assert re.search(r"optim\.learning_rate=0\.000(9765625|48828125)\b", capsys.readouterr().out)


def test_a_dry_run_writes_nothing(file, tmp_path, capsys):
    assert main(command(file, tmp_path / "r", "--trials=2", "--dry_run")) == 0
    assert "2 runs (0 done)" in capsys.readouterr().out and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--sweep=other", "--trials=1"), "search_wrong"),
        (("--sweep=none", "--trials=1"), "seed"),
        (("--sweep=search_none", "--trials=1"), "seed"),
        (("--sweep=text", "--trials=1"), "search_text failed"),
        (("--sweep=exits", "--trials=1"), "no space"),
        ((), "--trials"),
        (("--trials=1", "--config.optim.schedule=cosine"), "optim.schedule"),
        (("--trials=1", "--config.checkpoint.best=None"), "checkpoint.best"),
        (("--trials=1", "--backend=slurm"), "--backend slurm"),
        (("--trials=1", "--only", "0"), "--only"),
        (("--trials=1", "--out=scripts"), "--out"),
        (("--summary",), "no trial"),
        (("--trials=1", "--workdir=gs://b/x"), "gs://b/x"),
        (("--trials=1", "--halving", "--config.eval.every=0"), "eval.every"),
    ],
)
def test_mistakes(words, named, file, tmp_path, capsys):
    assert main(command(file, tmp_path / "r", *words)) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("named", "before", "after"),
    [
        ("optim.schedule", '"constant"', '"linear"'),
        ("optim.accumulate", '"optim.accumulate": integers(1, 2),', ""),
        ("optim.learning_rate", "log=True", "log=False"),
        ("steps", "= 40, 4, 1", "= 50, 4, 1"),
    ],
)
def test_another_search_needs_another_root(named, before, after, file, capsys):
    """Nothing is drawn where the study has trials of another space, or runs of another config."""
    root = pathlib.Path(file).parent / "r"
    run = search.Study(search.read_space(file, str(root), "sweep", {}), "random", 1).draw()
    pathlib.Path(run.workdir).mkdir()
    (pathlib.Path(run.workdir) / "config.json").write_text(loading.to_json(run.run))
    pathlib.Path(file).write_text(CONFIG.replace(before, after))
    assert main(command(file, root, "--trials=2")) == 2
    assert named in capsys.readouterr().err.partition("there")[0]
    pathlib.Path(file).write_text(CONFIG.replace("uniform(1e-4", "uniform(1e-5"))
    wider = search.Study(search.read_space(file, str(root), "sweep", {}), "random", 2)
    wider.check()
    assert wider.draw().index == 1  # a range may change


def test_without_optuna_the_extra_is_named(file, tmp_path, capsys, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "optuna" else original(name, *a),
    )
    assert main(command(file, tmp_path / "r", "--trials=1")) == 2
    assert "[search]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda: sweeps.uniform(1, 1),
        lambda: sweeps.uniform(0, 1, log=True),
        lambda: sweeps.integers(2, 1),
        sweeps.choice,
        lambda: sweeps.choice((1, 2), [1, 2]),
    ],
)
def test_wrong_spaces(make):
    with pytest.raises(ValueError, match="want"):
        make()


@pytest.mark.slow
def test_real_runs_are_killed_and_go_on(file, tmp_path, capsys):
    words = command(file, tmp_path / "r", "--trials=2", "--config.steps=400")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "localglobal_jax", *words], stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "r").glob("c-search-000-*/metrics.jsonl")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 42 and "same command" in said
    assert main(words) == 0
    found = rows(capsys, words)
    assert [row["state"] for row in found] == ["done", "done"]
    events = json.loads(
        (next((tmp_path / "r").glob("c-search-000-*")) / "attempts.jsonl")
        .read_text()
        .split("\n")[1]
    )
    assert events["code"] == 42 and status.STATES[1] == "pruned"
