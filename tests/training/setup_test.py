# SPDX-License-Identifier: Apache-2.0
"""A run goes on only where it would see what it would have seen."""

import dataclasses
import re

import pytest

from localglobal_jax.checkpoints.manager import Restored
from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import host_memory
from localglobal_jax.training.setup import batch_bytes, prepare_setup

TEXTS = {"muse_lohelp.py": "pairs of lengths", "coatnet_digits.py": "images"}


class Saved:
    """Checkpoints of which the newest was made with other data, or says nothing of it."""

    def __init__(self, **metadata):
        self.metadata = metadata

    def restore(self, template, step):
        return Restored(step or 7, template, self.metadata)


@pytest.mark.parametrize("config", TEXTS)
def test_other_data_is_refused(config, tmp_path):
    run = validation.check(loading.load(f"configs/{config}:size=tiny,data=mock"))
    setup = prepare_setup(run, tmp_path / "run")
    order = setup.task.order
    assert TEXTS[config] in order
    assert setup.restore(Saved(order=order)).step == 7
    assert setup.restore(Saved()).step == 7  # saved before this was kept
    with pytest.raises(ValueError, match=f"step 5: 3 images .*{re.escape(order)}"):
        setup.restore(Saved(order="3 images"), 5)
    assert not (tmp_path / "run").exists()


def test_changed_data_is_accepted_when_told_to(tmp_path, caplog):
    config = loading.load("configs/coatnet_digits.py:size=tiny,data=mock")
    config.data.accept_changes = True
    setup = prepare_setup(validation.check(config), tmp_path / "run")
    assert setup.restore(Saved(order="3 images")).step == 7
    assert "3 images" in caplog.text
    caplog.clear()
    setup.restore(Saved(order=setup.task.order))
    assert not caplog.text
    task = dataclasses.replace(setup.task, labels=("cat", "dog"))
    setup = setup._replace(task=task)
    assert setup.restore(Saved(order=task.order, labels=["cat", "dog"])).step == 7
    with pytest.raises(ValueError, match="cat, owl"):  # other classes are not other records
        setup.restore(Saved(order=task.order, labels=["cat", "owl"]))


def test_what_fits_into_no_memory_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    convolutions = {"model.layout": "CC"}  # attention has another limit, that of its positions
    config = loading.load("configs/coatnet_digits.py:size=tiny,data=mock", convolutions)
    run = validation.check(config)
    monkeypatch.setattr(host_memory, "total", lambda: batch_bytes(run))  # no more than a batch
    with pytest.raises(ValueError, match=r"config\.model"):
        prepare_setup(run, tmp_path / "run")
    monkeypatch.setattr(host_memory, "total", lambda: batch_bytes(run) // 2)
    with pytest.raises(ValueError, match=f"batch_size={run.batch_size}"):
        prepare_setup(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
