# SPDX-License-Identifier: Apache-2.0
"""Whole sweeps on this machine: the command line, real runs, in two slots."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from localglobal_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"""
from localglobal_jax.config import loading

def get_config(arg=None):
    config = loading.load({str(ROOT / "configs/coatnet_digits.py")!r} + ":size=tiny,data=mock")
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.batch_size, config.optim.warmup_steps = 4, 1
    config.data.eval_splits = ("test[:8]",)
    config.checkpoint.best = None
    config.log = dict(every=1)
    return config

def sweep():
    for seed in range(2):
        yield {{"seed": seed, "optim.learning_rate": 1e-3}}

def sweep_bad():
    yield {{"model.widths": (6144,)}}
    yield {{"optim.learning_rate": 1e30, "optim.clip_norm": 0.0, "optim.name": "sgd"}}
"""


def start(folder, *words, before=(), **options):
    """A sweep as a process of its own, started by the command `before`.

    Its workdirs are the folders of ``folder/runs``.
    """
    (folder / "c.py").write_text(CONFIG)
    command = [sys.executable, "-m", "localglobal_jax", "sweep", f"--config={folder / 'c.py'}"]
    command += [f"--workdir={folder / 'runs'}", *words]
    words = [*before, *command]
    return command, subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options)


def events(folder):
    file = folder / "attempts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def folders(folder):
    return sorted((folder / "runs").glob("c-*00?-*"))


@pytest.mark.slow  # with children that do not train: pool_test.py
def test_a_killed_child_is_started_again(tmp_path, capsys):
    command, sweep = start(tmp_path, "--slots=2", "--retries=1", "--config.steps=2")
    wait_for(sweep, lambda: len(folders(tmp_path)) == 2 and events(folders(tmp_path)[1]))
    os.kill(events(folders(tmp_path)[0])[0]["pid"], signal.SIGKILL)
    _, said = sweep.communicate(timeout=3000)
    assert sweep.returncode == 0, said
    assert "killed by SIGKILL, 1 of 1 retries" in said and "2 of 2 done" in said
    first, second = folders(tmp_path)
    assert [event.get("code") for event in events(first)] == [None, -9, None, 0]
    assert [event.get("code") for event in events(second)] == [None, 0]

    assert main([*command[3:], "--config.steps=2", "--collect", str(tmp_path / "r.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [(row["state"], row["step"], row["seed"]) for row in rows] == [
        ("done", "2", "0"),
        ("done", "2", "1"),
    ]
    assert rows[0]["test[:8]/loss"] != rows[1]["test[:8]/loss"]
    capsys.readouterr()
    # again: there is nothing to do
    assert main([*command[3:], "--config.steps=2"]) == 0
    assert "2 of 2 done" in capsys.readouterr().err
    # another config in the same folders: refused before anything starts
    assert main([*command[3:], "--config.steps=3"]) == 2
    assert "steps: 2 there, 3 now" in capsys.readouterr().err
    # and its numbers do not pass for those of the other one
    assert main([*command[3:], "--config.steps=3", "--status", "--json"]) == 0
    states = [(run["state"], run["note"]) for run in json.loads(capsys.readouterr().out)["runs"]]
    assert states == [("other config", "steps: 2 there, 3 now")] * 2
    assert len(events(second)) == 2


@pytest.mark.slow  # with children that do not train: pool_test.py
def test_two_starters_after_a_killed_one_end_well(tmp_path):
    """The child of a killed launcher goes on; it is waited for, and all runs are counted."""
    words = ("--slots=1", "--config.steps=2")
    _, killed = start(tmp_path, *words)
    wait_for(killed, lambda: folders(tmp_path) and events(folders(tmp_path)[0]))
    killed.kill()
    killed.communicate()
    both = [start(tmp_path, *words)[1] for _ in range(2)]
    ends = [process.communicate(timeout=3000)[1] for process in both]
    for process, said in zip(both, ends, strict=True):
        assert process.returncode == 0, said
        assert said.splitlines()[-1] == "2 of 2 done, 0 failed"
    first, second = folders(tmp_path)
    starts = [[e["event"] for e in events(folder)].count("start") for folder in (first, second)]
    assert starts == [1, 1], ends


@pytest.mark.parametrize(
    ("only", "said_of_it", "row"),
    [
        ("0", ("out of memory: ",), ("out of memory: ", "6144")),
        # with a child that does not train: pool_test.py
        pytest.param("1", ("exit code 3 (diverged)", "no checkpoint had been saved"),
                     ("NaN or infinite", "16"), marks=pytest.mark.slow),
    ],
    ids=["memory", "diverged"],
)  # fmt: skip
def test_what_is_said_of_a_crash_by_memory_and_of_a_diverged_run(
    only, said_of_it, row, tmp_path, capsys
):
    limited = ("bash", "-c", 'ulimit -v 4194304; exec "$@"', "limited")  # KiB
    words = ("--sweep=bad", "--config.steps=9", "--only", only)
    command, sweep = start(tmp_path, *words, "--slots=2", "--retries=0", before=limited)
    _, said = sweep.communicate(timeout=3000)
    assert sweep.returncode == 1 and said.splitlines()[-1] == "0 of 1 done, 1 failed", said
    assert all(text in said for text in said_of_it) and "JAX has removed" not in said
    assert main([*command[3:8], "--summary", "--format=csv", *words[1:]]) == 0
    (found,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert found["state"] == "failed"
    assert row[0] in found["reason"] and row[1] in found["model.widths"]


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path):
    words = ("--slots=2", "--config.steps=3000", "--config.checkpoint.every=0")
    _, sweep = start(tmp_path, *words)

    def training():
        files = [folder / "metrics.jsonl" for folder in folders(tmp_path)]
        return len(files) == 2 and all(f.exists() and f.stat().st_size for f in files)

    wait_for(sweep, training)
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate(timeout=3000)
    assert sweep.returncode == 42, said
    for folder in folders(tmp_path):
        assert [event.get("code") for event in events(folder)] == [None, 42]
        assert list((folder / "checkpoints").iterdir())
    _, sweep = start(tmp_path, *words)
    _, said = sweep.communicate(timeout=6000)
    assert sweep.returncode == 0, said
    for folder in folders(tmp_path):
        assert "resumed at step" in (folder / "log.txt").read_text()
        assert (folder / "checkpoints" / "3000").is_dir()
