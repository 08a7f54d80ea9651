# SPDX-License-Identifier: Apache-2.0
"""Every config is valid, and its tiny size trains for two steps on synthetic data."""

import pathlib

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import placement
from localglobal_jax.training import optim
from localglobal_jax.training.step import check_batches

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
IMAGES = ["--config.batch_size=4", "--config.eval.batch_size=128"]
# One batch shape and no beam search, to compile less; tests of tasks and decoding cover both.
TEXT = ["--config.data.buckets=1", "--config.task.beam=0", "--config.checkpoint.best=None"]


# One of text in every run of the suite; readme_test.py trains one of images. The others compile
# much the same programs.
OFTEN = ("muse_lohelp",)
MARKED = [
    pytest.param(file, id=file.stem, marks=() if file.stem in OFTEN else pytest.mark.slow)
    for file in CONFIGS
]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_is_valid_with_its_optimizer_and_mesh(file, size):
    """All checks that need no data, of the full run and the tiny one."""
    argument = ":size=tiny" if size == "tiny" else ""
    run = validation.check(loading.load(f"{file}{argument}"))
    optim.make_optimizer(run.optim, run.steps)
    check_batches(run, placement.Partitioner(run.parallel))


@pytest.mark.parametrize("file", MARKED)
def test_tiny_run_on_mock_data(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    spec = f"{file}:size=tiny,data=mock"
    tokens = validation.check(loading.load(spec)).task.name == "translation"
    command = [
        *("train", f"--config={spec}", f"--workdir={tmp_path / 'run'}"),
        *("--config.steps=2", "--config.optim.warmup_steps=1"),
        *("--config.checkpoint.every=1", "--config.log.every=1"),
        *(TEXT if tokens else IMAGES),
    ]
    assert main(command) == 0
    assert not (tmp_path / "nothing").exists()
