# SPDX-License-Identifier: Apache-2.0
"""The examples that a run shows beside its curves are those of its evaluation."""

import pathlib

import jax
import numpy as np
import pytest

from localglobal_jax import configlib, optim, samples
from localglobal_jax.tasks import create_task
from localglobal_jax.train_step import init_state

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def shown(config, tmp_path, count):
    overrides = {"log.samples": str(count), "log.tensorboard": "false"}
    run = configlib.check(configlib.load(f"{CONFIGS / config}:size=tiny,data=mock", overrides))
    task = create_task(run, workdir=tmp_path)
    task.save(tmp_path)
    state = init_state(task, optim.make_optimizer(run.optim, run.steps), run)
    return task, samples.Samples(run, task, tmp_path)(state.variables)


@pytest.mark.parametrize("config", ["coatnet_digits.py", "volo_imagenet.py", "focal_imagenet.py"])
def test_pictures_and_where_the_model_looked(config, tmp_path):
    task, found = shown(config, tmp_path, 3)
    split, evaluator = next(iter(task.evaluators.items()))
    height, width = next(evaluator.batches())["image"].shape[1:3]
    picture = found.pop(f"{split}/looked_at")
    assert not found
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert picture.shape[1] / picture.shape[0] == pytest.approx(3 * width / height)


def test_sentences_and_what_became_of_them(tmp_path):
    task, found = shown("muse_lohelp.py", tmp_path, 4)
    split, evaluator = next(iter(task.evaluators.items()))
    rows = found[f"{split}/translations"].splitlines()
    assert len(rows) == 2 + 4 and all(row.count(" | ") == 2 for row in rows)
    real = next(evaluator.batches())["mask"].any(1).sum()
    assert real >= 4
    picture = found.get(f"{split}/cross_attention")
    assert picture is None or (picture.ndim, picture.dtype) == (3, np.uint8)


def test_none_unless_asked_for(tmp_path):
    assert shown("coatnet_digits.py", tmp_path, 0)[1] == {}
    assert jax.process_count() == 1
