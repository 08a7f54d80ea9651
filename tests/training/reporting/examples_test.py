# SPDX-License-Identifier: Apache-2.0
"""The examples that a run shows beside its curves are those of its evaluation."""

import pathlib

import event_files
import jax
import numpy as np
import pytest
import small

from localglobal_jax.config import loading, schema, validation
from localglobal_jax.training import loop, optim
from localglobal_jax.training.reporting import examples
from localglobal_jax.training.step import init_state
from localglobal_jax.training.tasks import create_task

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"


SMALL_FOCAL = {
    "model.layout": "FF",
    "model.depths": "(1, 1)",
    "model.widths": "(16, 32)",
    "model.heads": "(2, 2)",
    "model.expand": "(2, 2)",
    "model.levels": "(2, 2)",
    "model.focal_windows": "(3, 1)",
}


def shown(config, tmp_path, count, model=small.IMAGES):
    overrides = {"log.samples": str(count), "log.tensorboard": "true", **model}
    run = validation.check(loading.load(f"{CONFIGS / config}:size=tiny,data=mock", overrides))
    task = create_task(run, workdir=tmp_path)
    task.save(tmp_path)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    state = jax.jit(lambda: init_state(task, optimizer, run))()
    return task, examples.ExampleLogger(run, tmp_path)(task, state.variables)


@pytest.mark.parametrize(
    ("config", "model"),
    [("coatnet_digits.py", small.IMAGES), ("focal_imagenet.py", SMALL_FOCAL)],
    ids=["coatnet", "focal"],
)
def test_pictures_and_where_the_model_looked(config, model, tmp_path):
    task, found = shown(config, tmp_path, 3, model)
    split, evaluator = next(iter(task.evaluators.items()))
    height, width = next(evaluator.batches())["image"].shape[1:3]
    picture = found.pop(f"{split}/looked_at")
    assert not found
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert picture.shape[1] / picture.shape[0] == pytest.approx(3 * width / height)


def test_sentences_and_what_became_of_them(tmp_path):
    task, found = shown("muse_lohelp.py", tmp_path, 4, small.TEXT)
    split = next(iter(task.evaluators))
    rows = found[f"{split}/translations"].splitlines()
    assert len(rows) == 2 + 4 and all(row.count(" | ") == 2 for row in rows)
    picture = found.get(f"{split}/cross_attention")
    assert picture is None or (picture.ndim, picture.dtype) == (3, np.uint8)


def test_the_cross_attention_is_to_the_source(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(examples, "_drawn", drawn.append)
    task, found = shown("muse_lohelp.py", tmp_path, 1, small.TEXT)
    split = next(iter(task.evaluators))
    row = found[f"{split}/translations"].splitlines()[2]
    source, reference, translation = (cell.split() for cell in row.strip("| ").split(" | "))
    (attention,) = drawn
    assert source != reference  # pieces of the made-up text are its words
    assert attention.source == [*source, "</s>"]
    assert attention.target == [*translation, "</s>"]


@pytest.mark.parametrize(
    ("config", "model", "names"),
    [
        ("coatnet_digits.py", small.IMAGES, {"looked_at"}),
        ("muse_lohelp.py", small.TEXT, {"translations/text_summary", "cross_attention"}),
    ],
    ids=["images", "text"],
)
def test_a_run_shows_them_in_tensorboard(config, model, names, tmp_path):
    short = {"steps": "2", "eval.every": "1", "log.samples": "1", "optim.warmup_steps": "0"}
    run = validation.check(loading.load(f"{CONFIGS / config}:size=tiny,data=mock", short | model))
    loop.train(run, tmp_path)
    split = run.data.eval_splits[0]
    tags = {
        (value.tag, event.step)
        for event in event_files.read(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert {(f"{split}/{name}", step) for name in names for step in (1, 2)} <= tags


def test_none_unless_asked_for(tmp_path):
    assert shown("coatnet_digits.py", tmp_path, 0)[1] == {}


def test_evenly_spread():
    assert examples.spread(101, 3).tolist() == [0, 50, 100]
    assert examples.spread(2, 3).tolist() == [0, 1]


def test_examples_that_cannot_be_made_end_no_run(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(examples, "spread", broken)
    assert shown("coatnet_digits.py", tmp_path, 3)[1] == {}
    assert "log.samples: OSError: the disk is gone" in caplog.text


def test_damaged_pictures_are_no_examples():
    options = schema.Images(name="digits")
    assert examples._pictures(options, np.zeros((0, 8, 8, 1), np.uint8), {}, None, {}) == {}


def test_the_maps_are_compiled_once(tmp_path, caplog):
    run = validation.check(loading.load(
        f"{CONFIGS / 'coatnet_digits.py'}:size=tiny,data=mock",
        {"log.samples": "2", "log.tensorboard": "true", **small.IMAGES},
    ))  # fmt: skip
    task = create_task(run, workdir=tmp_path)
    state = init_state(task, optim.make_optimizer(run.optim, run.steps), run)
    logger = examples.ExampleLogger(run, tmp_path)
    logger(task, state.variables)
    with jax.log_compiles():
        logger(task, state.variables)
    assert "grad_cam" not in caplog.text
