# SPDX-License-Identifier: Apache-2.0
"""Programs of an evaluation: one for each function and shape, whatever the number of splits."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
import small

from localglobal_jax.config import loading, schema, validation
from localglobal_jax.parallel import placement
from localglobal_jax.training import evaluation
from localglobal_jax.training.evaluation import Evaluation
from localglobal_jax.training.tasks import create_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("config", "fields", "splits", "functions"),
    [
        ("coatnet_digits", small.IMAGES, ("test", "train[:50%]"), 1),
        ("muse_iwslt14", small.TEXT, ("valid", "test"), 2),  # the loss, and the translations
    ],
)
def test_splits_share_their_programs(config, fields, splits, functions):
    """The second split compiles nothing that the first has compiled."""
    common = {"data.eval_splits": repr(splits), "checkpoint.best": "None"}
    run = validation.check(
        loading.load(f"{CONFIGS / config}.py:size=tiny,data=mock", fields | common)
    )
    task = create_task(run)
    evaluation = Evaluation(task, placement.Partitioner())
    inputs = [jnp.zeros(x.shape, x.dtype) for x in task.inputs]
    variables = jax.jit(lambda: task.model.init(jax.random.key(0), *inputs, train=False))()
    found = evaluation(variables)
    assert set(found) == set(splits)
    shapes = {
        tuple(x.shape for x in jax.tree.leaves(batch))
        for evaluator in task.evaluators.values()
        for batch in evaluator.batches()
    }
    programs = [step._cache_size() for step in evaluation._compiled.values()]
    assert programs == [len(shapes)] * functions


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (schema.ClassificationRun, "muse", "evaluates images, .* model of text"),
        (schema.TranslationRun, "coatnet", "evaluates text, .* model of images"),
    ],
)
def test_a_config_of_the_other_kind_is_refused(kind, name, words):
    with pytest.raises(ValueError, match=words):
        evaluation._check_kind(kind, {"model": {"name": name}}, "--config c.py")
    other = {"muse": schema.TranslationRun, "coatnet": schema.ClassificationRun}[name]
    evaluation._check_kind(other, {"model": {"name": name}}, "c.py")
