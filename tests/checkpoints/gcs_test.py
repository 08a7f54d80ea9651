# SPDX-License-Identifier: Apache-2.0
"""A workdir in a bucket of a real server."""

import csv
import json

import pytest
from etils import epath

from localglobal_jax.checkpoints import gcs, workdir
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.training import evaluation, loop


def test_small_files_go_there_and_come_back(bucket):
    one = gcs.LocalMirror(bucket)
    (one.local / "metrics.jsonl").write_text("1\n")
    (one.local / "tokenizer").mkdir()
    (one.local / "tokenizer" / "joint.model").write_bytes(b"\x00")
    one.push()
    (one.local / "metrics.jsonl").write_text("1\n2\n")
    one.push()
    other = gcs.LocalMirror(bucket)
    assert other.local != one.local
    assert (other.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert (other.local / "tokenizer" / "joint.model").read_bytes() == b"\x00"
    assert str(other.checkpoints) == f"{bucket}/checkpoints"


def test_a_run_is_resumed_and_evaluated_there(bucket, data_dir):
    options = {"data.dir": data_dir, "steps": "6", "log.tensorboard": "false"}
    config = loading.load("configs/coatnet_digits.py:size=tiny", options)
    results = loop.train(validation.check(config), bucket)
    there = epath.Path(bucket)
    assert {"config.json", "metrics.jsonl", "model_card.md"} <= {p.name for p in there.iterdir()}
    again = loop.train(validation.check(config), bucket)  # nothing is left to do
    assert again["test"] == results["test"]
    step, found = evaluation.evaluate(bucket)
    assert step == 6 and found["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-6)
    other = loading.load("configs/coatnet_digits.py:size=tiny", {**options, "seed": "7"})
    with pytest.raises(ValueError, match=r"seed: 0.*7"):
        loop.train(validation.check(other), bucket)


@pytest.mark.parametrize("path", ["gs:/bucket/x", "s3://a/b", "gs://bucket"])
def test_stores_that_nobody_knows(path):
    with pytest.raises(ValueError, match=path):
        workdir.is_remote(path)


def test_status_and_collect_look_there(bucket, tmp_path, capsys):
    """Of six runs one is done, one half way."""
    sweep = ["sweep", "--config=experiments/coatnet_layouts/sweep.py:size=tiny"]
    sweep += [f"--workdir={bucket}", "--backend=xpk", "--cluster=c", "--tpu_type=v5litepod-16"]
    assert main([*sweep, "--image=i", "--dry_run", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["runs"]]
    for name, step in zip(names, (20, 10), strict=False):
        folder = epath.Path(bucket) / name
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "files.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        line = {"step": step, "split": "test", "accuracy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    table = tmp_path / "all.csv"
    assert main([*sweep, "--status", f"--collect={table}"]) == 0
    said = capsys.readouterr().out
    assert "6 runs: 1 done, 1 unfinished, 4 not started" in said and "accuracy 0.5" in said
    done, half, *_ = csv.DictReader(table.read_text().splitlines())
    assert (done["state"], done["step"]) == ("done", "20")
    assert (half["state"], half["step"]) == ("unfinished", "10")
