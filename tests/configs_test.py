# SPDX-License-Identifier: Apache-2.0
"""Every config trains for a few steps, shrunken, on made-up data, and resumes."""

import pathlib

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import placement
from localglobal_jax.training import optim
from localglobal_jax.training.step import check_batches

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
IMAGES = ["--config.batch_size=4", "--config.eval.batch_size=128"]
# One shape of batch to compile, and no beam search: tests of tasks and decoding have those.
TEXT = ["--config.data.buckets=1", "--config.task.beam=0", "--config.checkpoint.best=None"]


# A model of each kind in every run of the suite; the others compile the same things again.
OFTEN = ("coatnet_digits", "muse_lohelp")
MARKED = [
    pytest.param(file, id=file.stem, marks=() if file.stem in OFTEN else pytest.mark.slow)
    for file in CONFIGS
]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_is_right(file, size):
    """The real run, whose data set is not here, and the shrunken one: all that needs no data."""
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
