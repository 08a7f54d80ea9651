# SPDX-License-Identifier: Apache-2.0
"""``machine.py --gpu`` on a CPU: our side is real, PyTorch's is a program that speaks its part."""

import csv
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import make

MACHINE = pathlib.Path(__file__).parent.parent / "experiments/benchmarks/machine.py"
# Stands for an interpreter with torch: `theirs.py infer ...` runs out of memory, the rest works.
THEIRS = """#!/bin/sh
case "$*" in
    *volo_d1_224*)
        echo "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" >&2
        echo "a last line that says nothing" >&2
        exit 1;;
esac
echo "some library's banner"
echo "ready torch 9.9, a stand-in"
while read line; do echo "seconds 0.5"; done
"""


@pytest.fixture
def theirs(tmp_path):
    file = tmp_path / "python"
    file.write_text(THEIRS)
    file.chmod(0o755)
    return file


def machine(*args, code=0, **environment):
    env = {**os.environ, "PYTHONPATH": str(MACHINE.parent.parent.parent), **environment}
    command = [sys.executable, str(MACHINE), "--gpu", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def rows(file):
    with file.open(newline="") as opened:
        return {row["name"]: row for row in csv.DictReader(opened)}


def test_a_row_without_memory_says_so_and_the_rest_go_on(theirs, tmp_path, monkeypatch):
    table = tmp_path / "gpu.csv"
    names = ("volo_d1", "coatnet_0 inference")
    args = ("--theirs", theirs, "--check", table, *names)
    said = machine(*args, code=1, PATH="")  # without nvidia-smi
    assert len(said) == 2
    found = rows(table)
    failed, done = (next(v for k, v in found.items() if k.startswith(name)) for name in names)
    assert "theirs.py" in failed["failed"] and "CUDA out of memory" in failed["failed"]
    assert "a last line" not in failed["failed"]
    assert not done["failed"] and float(done["their_seconds"]) == 0.5
    ours = float(done["our_seconds"])  # written with four decimals, and there are but a few
    assert 0.5 / (ours + 1e-4) < float(done["ratio_median"]) < 0.5 / (ours - 1e-4)
    assert done["gpu"] == "" and done["theirs"] == "torch 9.9, a stand-in"

    (again,) = machine(*args[:-2], "coatnet_0 inference", PATH="")
    assert "--again" in again and rows(table) == found  # it goes on where it was

    monkeypatch.setattr(make, "HERE", tmp_path)
    text = "\n".join(make.gpu())
    assert "CUDA out of memory" in text and "500 ms" in text


def test_the_first_of_several_gpus_is_named(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA H100 $4, 570.1"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.syspath_prepend(MACHINE.parent)
    pairs = importlib.import_module("pairs")
    assert pairs.gpu() == "NVIDIA H100 3, 570.1"
    smi.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert pairs.gpu() == ""


@pytest.mark.slow
def test_every_row(theirs, tmp_path):
    table = tmp_path / "check.csv"
    machine("--theirs", theirs, "--check", table, code=1)
    failed = {name for name, row in rows(table).items() if row["failed"]}
    assert len(rows(table)) == 5 and failed == {"volo_d1 inference / timm compiled"}
