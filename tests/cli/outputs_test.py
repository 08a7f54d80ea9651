# SPDX-License-Identifier: Apache-2.0
"""Options that write files on this machine: an address is an error before anything is done."""

import pathlib

import pytest

from localglobal_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
SWEEP = ["sweep", f"--config={ROOT / 'experiments/coatnet_layouts/sweep.py'}:size=tiny"]
COMMANDS = [
    ["report", "runs", "--out={}/page.html"],
    [*SWEEP, "--workdir=runs", "--collect={}/all.csv"],
    [*SWEEP, "--workdir=runs", "--out={}/scripts", "--backend=slurm"],
    [*SWEEP, "--workdir=runs", "--out={}/scripts", "--dry_run"],
    ["configs", "coatnet_digits.py", "--out={}/mine.py"],
    ["classify", "--workdir=runs", "one.png", "--overlay={}/seen"],
    ["translate", "--workdir=runs", "--attention={}/map.png"],
    ["export", "runs", "--format=safetensors", "--out={}/exported"],
]


@pytest.mark.parametrize("place", ["gs://bucket", "s3://bucket/a", "file:///tmp"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command[0]} {command[-1]}")
def test_an_address_is_refused(tmp_path, monkeypatch, capsys, command, place):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("{}", place) for word in command]) == 2
    (option,) = (word.replace("{}", place) for word in command if "{}" in word)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert option.replace("=", " ") in line and "upload" in line
    assert list(tmp_path.iterdir()) == []
