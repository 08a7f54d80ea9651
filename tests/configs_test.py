# SPDX-License-Identifier: Apache-2.0
"""Every config trains for a few steps, shrunken, on made-up data, and resumes."""

import pathlib

import pytest

from localglobal_jax import configlib
from localglobal_jax.cli import main

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
IMAGES = ["--config.batch_size=4", "--config.eval.batch_size=128"]
# One shape of batch to compile, and no beam search: tests of tasks and decoding have those.
TEXT = ["--config.data.buckets=1", "--config.task.beam=0", "--config.checkpoint.best=None"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_tiny_run_on_mock_data(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    spec = f"{file}:size=tiny,data=mock"
    tokens = configlib.check(configlib.load(spec)).task.name == "translation"
    command = [
        *("train", f"--config={spec}", f"--workdir={tmp_path / 'run'}"),
        *("--config.steps=2", "--config.optim.warmup_steps=1"),
        *("--config.checkpoint.every=1", "--config.log.every=1"),
        *(TEXT if tokens else IMAGES),
    ]
    assert main(command) == 0
    assert not (tmp_path / "nothing").exists()
