# SPDX-License-Identifier: Apache-2.0
"""Runs the evaluators of a task, in the training loop or on a saved checkpoint."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from localglobal_jax.checkpoints import gcs
from localglobal_jax.checkpoints.workdir import check_config
from localglobal_jax.config import loading, validation, values
from localglobal_jax.inference.load import read_run, read_variables
from localglobal_jax.parallel import multihost
from localglobal_jax.parallel.placement import Partitioner
from localglobal_jax.training import metrics
from localglobal_jax.training.tasks import Evaluator, Task, Variables, create_task

log = logging.getLogger(__name__)


class Evaluation:
    """The evaluators of a task, compiled once per shape of a batch."""

    def __init__(self, task: Task, partitioner: Partitioner):
        self._partitioner = partitioner
        self._evaluators: dict[str, tuple[Evaluator, Any, Any]] = {}
        for name, evaluator in task.evaluators.items():
            predict = evaluator.predict or (lambda variables, batch: None)
            self._evaluators[name] = (
                evaluator,
                partitioner.compile_eval(evaluator.metrics),
                partitioner.compile_eval(predict),
            )

    def check_metric(self, best: str | None) -> None:
        """Raises ValueError unless `best` is one of the metrics, see `metrics.check_best`."""
        known = [f"{s}/{m}" for s, (e, *_) in self._evaluators.items() for m in e.metric_names]
        metrics.check_best(best, known)

    def __call__(self, variables: Variables) -> dict[str, dict[str, float]]:
        """Returns ``{split: {metric: value}}``."""
        return {
            name: self._run(name, evaluator, step, predict, variables)
            for name, (evaluator, step, predict) in self._evaluators.items()
        }

    def _run(
        self, name: str, evaluator: Evaluator, step: Any, predict: Any, variables: Variables
    ) -> dict[str, float]:
        total, predicted = None, []
        for host_batch in evaluator.batches():
            batch = self._partitioner.global_batch(host_batch)
            sums = jax.device_get(step(variables, batch))
            total = sums if total is None else metrics.merge(total, sums)
            if evaluator.predict:
                predicted.append(jax.device_get(predict(variables, batch)))
        result = metrics.compute(total or {})
        if result["count"] != evaluator.size():
            raise RuntimeError(
                f"evaluated {result['count']} of the {evaluator.size()} examples of {name}: "
                "a batch was lost or counted twice"
            )
        return evaluator.finish(result, predicted)


def evaluate(
    workdir: str | pathlib.Path,
    step: int | str | None = None,
    overrides: Mapping[str, str] | None = None,
    average: int = 1,
) -> tuple[int, dict[str, Any]]:
    """Evaluates a checkpoint of `workdir`.

    Args:
      step: a number, "best", or None for the newest.
      overrides: changes of the config it was trained with, e.g. ``{"data.dir": "/data"}`` on
        another machine; ``model`` cannot change.
      average: evaluates the mean over this many checkpoints, `step` and those before it.

    Returns:
      The step, and ``{split: {metric: value}}``.
    """
    files = gcs.LocalMirror(workdir).local
    config = ConfigDict(values.tuples(read_run(files).model_dump()))
    for field, text in (overrides or {}).items():
        if field.split(".")[0] == "model":
            raise ValueError(
                f"config.{field}: the model of a checkpoint cannot change; leave it out"
            )
        loading.override(config, field, text)
    run = validation.check(config)
    partitioner = Partitioner(run.parallel)
    if not run.data.eval_splits:
        raise ValueError("data.eval_splits=() is empty: give a split to evaluate")
    field, rows = run.eval_rows
    partitioner.check_batch(rows, what=field)
    shard, parts = partitioner.shard, partitioner.batch_parts
    task = create_task(run, shard=shard, parts=parts, train=False, workdir=files)
    for evaluator in task.evaluators.values():
        if evaluator.summary and multihost.rank() == 0:
            log.info("data     %s", evaluator.summary)
    found, variables, metadata = read_variables(workdir, step, average)
    check_config(files, found, metadata)
    task.check_labels(metadata)
    return found, Evaluation(task, partitioner)(partitioner.put(variables))
