# SPDX-License-Identifier: Apache-2.0
"""Workdirs in every state -> a table and a CSV."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import time

import gcs_server
import pytest
from etils import epath

from localglobal_jax.checkpoints import workdir
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading
from localglobal_jax.launch import expand, pool, status

LAYOUTS = str(pathlib.Path(__file__).parents[2] / "experiments/coatnet_layouts/sweep.py")
NOW = 1e9


def make(run, *, saved=(), lines=(), events=(), age=5.0, config=True):
    """A workdir as a run may have left it."""
    folder = pathlib.Path(run.workdir)
    folder.mkdir(parents=True)
    if config:
        (folder / "config.json").write_text(loading.to_json(run.run))
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "files.json").touch()
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "spl'  # torn
        (folder / "metrics.jsonl").write_text(text)
        os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    if events:
        text = "".join(json.dumps({**e, "time": NOW - age}) + "\n" for e in events)
        (folder / "attempts.jsonl").write_text(text)


START, KILLED = {"event": "start"}, {"event": "end", "code": -9}
SAVED, WRONG = {"event": "end", "code": 42}, {"event": "end", "code": 2}
STOPPED = {"event": "end", "code": -15, "next": "stopped"}  # before it could save
RETRIED, GIVEN_UP = ({**KILLED, "next": following} for following in ("retry", "failed"))
IDLE = {**SAVED, "next": "failed"}  # saved nothing for ten times
LINE = {"step": 10, "split": "train", "loss": 0.5}


@pytest.mark.parametrize(
    ("files", "state", "note"),
    [
        ({"saved": [20], "lines": [LINE], "events": [START]}, "done", ""),
        ({"saved": [10], "lines": [LINE]}, "running", "5 s ago"),
        ({"lines": [LINE], "age": 700.0}, "preempted", "silent: last line 11:40 min ago"),
        ({"saved": [10], "events": [START, SAVED]}, "preempted", "saved at step 10"),
        ({"saved": [10], "events": [START, KILLED]}, "failed", "killed by SIGKILL"),
        ({"saved": [10], "events": [START, KILLED, START]}, "running", "5 s ago"),
        ({"saved": [10], "events": [START, STOPPED]}, "preempted", "SIGTERM, saved at step 10"),
        ({"events": [START, STOPPED]}, "preempted", "SIGTERM, nothing was saved"),
        ({"saved": [10], "events": [START, RETRIED]}, "preempted", "SIGKILL, saved at step 10"),
        ({"saved": [10], "events": [START, GIVEN_UP]}, "failed", "killed by SIGKILL"),
        ({"saved": [10], "events": [START, IDLE]}, "failed", "exit code 42"),
        ({"events": [START, WRONG], "config": False}, "failed", "exit code 2 (wrong config"),
        ({"config": False}, "not started", ""),
    ],
)
def test_states(files, state, note, tmp_path):
    run = expand.expand(f"{LAYOUTS}:size=tiny", str(tmp_path)).runs[0]
    make(run, **files)
    row = status.read(run, NOW)
    assert (row["state"], row["steps"]) == (state, 20)
    assert note in row["note"]
    assert row["saved"] == max(files.get("saved", []), default=None)


@pytest.mark.parametrize("backend", pool.BACKENDS)
def test_the_end_of_a_run_in_a_bucket_is_known_where_it_was_started(
    backend, tmp_path, monkeypatch, gcs
):
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    root = f"gs://{gcs_server.new_bucket(gcs)}/runs"
    run = expand.expand(f"{LAYOUTS}:size=tiny", root).runs[0]
    assert status.read(run)["state"] == "not started"
    folder = pool.folder(run, backend)
    folder.mkdir(parents=True)
    now = time.time()
    wrong = {**WRONG, "next": "failed", "reason": "no such data", "time": now}
    (folder / "attempts.jsonl").write_text(f"{json.dumps(wrong)}\n")
    row = status.read(run)
    assert row["state"] == "failed" and "no such data" in row["note"]
    assert str(folder / "log.txt") in row["note"]
    (epath.Path(run.workdir) / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    assert status.read(run)["state"] == "failed"  # it wrote before it ended
    earlier = {**wrong, "time": now - 3600}
    (folder / "attempts.jsonl").write_text(f"{json.dumps(earlier)}\n")
    assert status.read(run)["state"] == "unfinished"  # another machine goes on with it


def test_a_run_that_deletes_checkpoints_meanwhile_is_read(tmp_path, monkeypatch):
    """As `checkpoint.keep` does: a folder, and a file, that are gone after they were listed."""
    run = expand.expand(f"{LAYOUTS}:size=tiny", str(tmp_path)).runs[0]
    make(run, saved=[5, 10], lines=[LINE], events=[START])
    there, walk = os.path.isdir, os.walk
    kind = type(workdir.absolute(tmp_path))
    is_dir = kind.is_dir

    def vanishing(path, **options):
        found = is_dir(path, **options)
        if path.name == "5":
            shutil.rmtree(path, ignore_errors=True)
        return found

    monkeypatch.setattr(kind, "is_dir", vanishing)
    monkeypatch.setattr(os, "walk", lambda top: [*walk(top), (str(top), [], ["gone"])])
    row = status.read(run, NOW, whole=True)
    assert (row["saved"], row["state"]) == (10, "running") and row["disk"] > 100
    assert not there(tmp_path / run.name / "checkpoints" / "5")


def test_an_empty_checkpoint_is_none(tmp_path):
    run = expand.expand(f"{LAYOUTS}:size=tiny", str(tmp_path)).runs[0]
    assert status.read(run)["state"] == "not started"
    (tmp_path / run.name / "checkpoints" / "20").mkdir(parents=True)
    assert status.latest_step(tmp_path / run.name) is None


def test_status_and_collect(tmp_path, capsys):
    runs = expand.expand(f"{LAYOUTS}:size=tiny", str(tmp_path)).runs
    evaluation = {"step": 20, "split": "test", "accuracy": 0.25, "count": 360}
    make(runs[0], saved=[10, 20], lines=[LINE, {**LINE, "step": 20, "loss": 0.25}, evaluation])
    make(runs[5], saved=[10], lines=[LINE], events=[START, SAVED])
    command = ["sweep", f"--config={LAYOUTS}:size=tiny", f"--workdir={tmp_path}"]
    file = tmp_path / "results.csv"
    assert main([*command, "--status", "--collect", str(file)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and table[-1] == "6 runs: 1 done, 1 preempted, 4 not started"
    assert "done" in table[0] and "20/20" in table[0] and "test: accuracy 0.25" in table[0]
    assert "preempted" in table[5] and "10/20" in table[5]

    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["name"] for row in rows] == [run.name for run in runs]
    assert rows[0]["train/loss"] == "0.25" and rows[0]["test/accuracy"] == "0.25"
    assert rows[0]["model.layout"] == "CCCC" and rows[0]["model.depths"] == "(1, 1, 4, 1)"
    assert rows[5]["state"] == "preempted" and rows[5]["train/loss"] == "0.5"
    assert rows[1]["state"] == "not started" and rows[1]["train/loss"] == ""
    before = file.read_bytes()
    assert main([*command, "--collect", str(file), "--json"]) == 0
    assert file.read_bytes() == before
    found = json.loads(capsys.readouterr().out)["runs"]
    assert found[0]["metrics"]["test"]["accuracy"] == 0.25


def test_collect_has_the_commit_of_each_run(tmp_path):
    runs = expand.expand(f"{LAYOUTS}:size=tiny", str(tmp_path)).runs
    command = ["sweep", f"--config={LAYOUTS}:size=tiny", f"--workdir={tmp_path}"]
    command += ["--collect", str(tmp_path / "results.csv")]
    for run in runs[:2]:
        make(run, saved=[20], lines=[{**LINE, "step": 20}])
    assert main(command) == 0  # neither run is of a git checkout
    assert "commit" not in (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    about = {"metadata": {"environment": {"commit": "0123abc-dirty"}}}
    folder = tmp_path / runs[1].name / "checkpoints" / "20" / "metadata"
    folder.mkdir(exist_ok=True)
    (folder / "metadata").write_text(json.dumps(about))
    assert main(command) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["commit"] for row in rows[:3]] == ["", "0123abc-dirty", ""]


def test_descriptions_do_not_change():
    run = expand.expand(LAYOUTS, "gs://b/runs").runs[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.name = "other"
