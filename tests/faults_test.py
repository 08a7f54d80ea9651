# SPDX-License-Identifier: Apache-2.0
"""Short versions of experiments/stress/faults: runs that are killed, damaged, starved, doubled."""

import json
import logging
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from localglobal_jax.checkpoints import reader
from localglobal_jax.training import evaluation, verification

FAULTS = pathlib.Path(__file__).parents[1] / "experiments" / "stress" / "faults"
sys.path.insert(0, str(FAULTS))

import compare
import corrupt
import damage
import disk
import kill

STEPS = 48
SHORT = {  # one block with BatchNorm and dropped paths, since every process compiles
    "steps": str(STEPS),
    "model.layout": "C",
    "model.depths": "(1,)",
    "model.widths": "(8,)",
    "model.strides": "(1,)",
}
PLANS = {  # (moments with their signals, what they hit for certain)
    "two": ([("save", "KILL"), ("evaluation", "TERM then KILL")], set()),
    "four": (
        [
            ("preparation", "KILL"),
            ("compile", "KILL"),
            ("training", "TERM"),
            ("evaluation", "TERM then KILL"),
        ],
        {"data preparation", "first compile"},
    ),
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory, data_dir):
    """Runs on a copy of the digits; its processes share their compiled programs."""
    work = tmp_path_factory.mktemp("kills")
    shutil.copytree(data_dir, work / "images-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield kill.Harness(work, overrides=SHORT)


@pytest.mark.parametrize("plan", PLANS)
def test_kills_change_no_bit(harness, plan):
    moments, hit = PLANS[plan]
    told = []
    result = harness.chain(
        "images", moments, np.random.default_rng(0), lambda **line: told.append(line), patience=0.05
    )
    assert result["problems"] == []
    assert result["kills"] == len(moments), told
    assert [line["signal"] for line in told] == [how for _, how in moments]
    assert hit <= {line["hit"] for line in told}
    assert told[-1]["newest"] >= 3


def test_the_comparison_finds_differences(harness, tmp_path):
    """Without this the test above could not fail."""
    reference, _ = harness.reference("images")
    steps = [entry["step"] for entry in reader.inspect(reference)["steps"]]

    def differences(spoil):
        other = shutil.copytree(reference, tmp_path / "other")
        spoil(other)
        found = compare.differences(reference, other, steps=STEPS, wanted_steps=steps)
        shutil.rmtree(other)
        return " ".join(found)

    def change(name, old, new):
        def damage(folder):
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1))

        return damage

    def drop_last_line(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))

    line = (reference / "metrics.jsonl").read_text().splitlines()[3] + "\n"
    assert differences(lambda folder: None) == ""
    assert "twice" in differences(change("metrics.jsonl", line, line + line))
    assert "metrics.jsonl: " in differences(drop_last_line)
    assert "expected" in differences(lambda d: shutil.rmtree(d / "checkpoints" / str(steps[-2])))
    batches = (reference / "batches.txt").read_text().splitlines()
    assert "steps [5]" in differences(change("batches.txt", batches[5], "5 00000000"))
    assert "no batch" in differences(change("batches.txt", batches[5], batches[6]))
    assert "config.json" in differences(change("config.json", '"seed": 0', '"seed": 1'))


def test_workers_and_evaluations_change_no_bit(harness, tmp_path):
    reference, data_dir = harness.reference("images")
    other = {"data.threads": "1", "eval.every": "0", "checkpoint.every": "7", "log.every": "5"}
    changed = kill.Harness(harness.work, overrides=SHORT | other)
    assert changed.train("images", tmp_path, data_dir).finish() == 0
    ours, _ = compare.arrays(tmp_path, STEPS)
    theirs, _ = compare.arrays(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert np.asarray(x).tobytes() == np.asarray(theirs[path]).tobytes(), path
    assert compare.batches_differ(reference, tmp_path, STEPS) == []


# In the suite: a lock that a process holds (checkpoints/workdir_test.py), and runs that find one
# (parallel/multihost_test.py).
@pytest.mark.slow
def test_two_runs_in_one_workdir(harness, tmp_path):
    _, data_dir = harness.reference("images")
    first = harness.train("images", tmp_path, data_dir)
    assert first.wait_for(lambda: first.count("run      "))
    second = harness.train("images", tmp_path, data_dir)
    assert second.finish() == 1
    assert f"locked by pid {first.process.pid} on " in second.lines[-1]
    assert not second.count("Traceback")
    first.end("KILL", None)
    assert (tmp_path / ".lock").exists()  # and locks nothing, see workdir_test.py


def test_files_beside_the_checkpoints(harness, tmp_path):
    """Damage is found by a run that resumes and by `inspect --verify`, or changes nothing."""
    reference, data_dir = harness.reference("images")
    folder = shutil.copytree(reference, tmp_path / "run")
    steps = reader.inspect(folder)["steps"]
    assert verification.check_files(folder, steps) == [
        {"file": "config.json", "error": None},
        {"file": "metrics.jsonl", "error": None},
    ]
    os.environ["TFDS_DATA_DIR"], before = str(data_dir), os.environ.get("TFDS_DATA_DIR")
    try:
        results = list(damage.Checkpointed("images", folder).beside(np.random.default_rng(0), 60))
    finally:
        os.environ.pop("TFDS_DATA_DIR")
        os.environ |= {"TFDS_DATA_DIR": before} if before else {}
    assert [result for result in results if not result["ok"]] == []
    assert {result["file"] for result in results} == {"config.json", "metrics.jsonl"}
    assert sum(bool(result["said"]) for result in results) > 60


def test_evaluate_raises_on_another_config(harness, tmp_path):
    reference, data_dir = harness.reference("images")
    folder = shutil.copytree(reference, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["data"]["mean"] = [0.25]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"data\.mean: \(0\.5,\).* {STEPS}, \(0\.25,\)"):
        evaluation.evaluate(folder, overrides={"data.dir": str(data_dir)})


# ---------------------------------------------------------------------------- long ones


@pytest.mark.slow
def test_every_file_of_a_checkpoint(tmp_path):
    made, rng = corrupt.train("images", tmp_path / "images"), np.random.default_rng(0)
    logging.getLogger("localglobal_jax").propagate = False
    try:
        results = [*made.every_file(rng, 1), *made.all_steps(rng)]
    finally:
        logging.getLogger("localglobal_jax").propagate = True
    assert [result for result in results if not result["ok"]] == []
    assert len(results) > 150


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """Runs on file systems of their own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    return disk.Disk(tmp_path_factory.mktemp("disk"), "images")


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 24, 40, 480, 1120])
def test_a_disk_that_fills(mounts, kilobytes):
    result = mounts.full(kilobytes)
    assert result["ok"], result
    assert result["exit"] == 1


@pytest.mark.slow
def test_a_file_system_that_cannot_be_written(mounts):
    result = mounts.read_only()
    assert result["ok"], result


@pytest.mark.slow
def test_a_clock_that_jumps(mounts):
    result = mounts.clock()
    assert result["ok"], result
