# SPDX-License-Identifier: Apache-2.0
"""Evaluators, inside the loop or on a saved checkpoint; and a trained model back from its files."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from localglobal_jax.checkpoints import gcs, manager, reader
from localglobal_jax.checkpoints.workdir import check_config
from localglobal_jax.config import loading, schema
from localglobal_jax.models import create_model
from localglobal_jax.parallel import placement as parallel
from localglobal_jax.training import metrics
from localglobal_jax.training.tasks import Evaluator, Task, Variables, create_task


class Evaluation:
    """Runs every evaluator of a task; each is compiled once, however often it runs."""

    def __init__(self, task: Task, placement: parallel.Placement):
        self._placement = placement
        self._evaluators: dict[str, tuple[Evaluator, Any, Any]] = {}
        for name, evaluator in task.evaluators.items():
            predict = evaluator.predict or (lambda variables, batch: None)
            self._evaluators[name] = (
                evaluator,
                placement.compile_eval(evaluator.metrics),
                placement.compile_eval(predict),
            )

    def check_metric(self, best: str | None) -> None:
        """Raises ValueError unless `best` ("test/accuracy", "-test/loss") will be measured."""
        known = [f"{s}/{m}" for s, (e, *_) in self._evaluators.items() for m in e.metric_names]
        if best and best.removeprefix("-") not in known:
            raise loading.unknown("metric in checkpoint.best:", best.removeprefix("-"), known)

    def __call__(self, variables: Variables) -> dict[str, dict[str, float]]:
        """``{split: {metric: value}}``."""
        return {
            name: self._run(name, evaluator, step, predict, variables)
            for name, (evaluator, step, predict) in self._evaluators.items()
        }

    def _run(
        self, name: str, evaluator: Evaluator, step: Any, predict: Any, variables: Variables
    ) -> dict[str, float]:
        total, predicted = None, []
        for host_batch in evaluator.batches():
            batch = self._placement.global_batch(host_batch)
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
    """Evaluates a checkpoint of `workdir`: its step and all metrics.

    `step` and `average`: see `load`. `overrides`: of the config it was trained with, e.g.
    ``{"data.dir": "/data"}`` on another machine.
    """
    files = gcs.Copy(workdir).local
    config = ConfigDict(loading.tuples(read_run(files).model_dump()))
    for field, text in (overrides or {}).items():
        if field.split(".")[0] == "model":
            raise ValueError(
                f"config.{field}: the model is that of the checkpoint, it cannot change"
            )
        loading.override(config, field, text)
    run = loading.check(config)
    placement = parallel.Placement(run.parallel)
    if not run.data.eval_splits:
        raise ValueError("data.eval_splits=() names nothing to evaluate: give a split")
    field, rows = run.eval_rows
    placement.check_batch(rows, what=field)
    task = create_task(run, shard=placement.shard, train=False, workdir=files)
    found, variables, metadata = read_variables(workdir, step, average)
    check_config(files, found, metadata)
    task.check_labels(metadata)
    return found, Evaluation(task, placement)(placement.put(variables))


def find_step(path: str | pathlib.Path, step: int | str | None) -> int | None:
    """The number of a step given as a number, as "best" (of a workdir), or as None: the newest."""
    if step is None or str(step).isdigit():
        return None if step is None else int(step)
    if step != "best":
        raise ValueError(f'step "{step}": give a number, or "best"')
    copy = gcs.Copy(path)
    best = manager.Checkpoints(copy.checkpoints, read_run(copy.local).checkpoint).best()
    if best is None:
        raise ValueError(f"no step of {path} has the metric that its checkpoint.best names")
    return best


def read_run(workdir: pathlib.Path) -> schema.Run:
    """The config that `workdir` was trained with."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{workdir} is not a workdir: it has no config.json. "
            "Give the directory that `localglobal train --workdir` wrote to"
        )
    return loading.read_json(file)


def load(
    path: str | pathlib.Path, step: int | str | None = None, average: int = 1
) -> tuple[nn.Module, Variables]:
    """A trained model from our checkpoints: ``(module, variables)``, ready for ``module.apply``.

    Args:
      path: a workdir, its checkpoints folder, or one step's folder.
      step: a number, "best" (of a workdir), or None: the newest.
      average: the mean over so many checkpoints, this one and those before it.

    If the run kept a moving average of its variables, that is what is given. Needs neither the
    data set nor the config.
    """
    _, variables, metadata = read_variables(path, step, average)
    spec: dict[str, Any] = loading.tuples(metadata["model"])
    return create_model(**spec), jax.device_put(variables)


def read_variables(
    path: str | pathlib.Path, step: int | str | None = None, average: int = 1
) -> tuple[int, Variables, dict[str, Any]]:
    """``(step, variables, metadata)`` as NumPy arrays, see `load`.

    Checkpoint averaging as in arXiv 1706.03762, section 6.1. Raises ValueError if fewer than
    `average` checkpoints are kept.
    """
    last, state, metadata = reader.read(path, find_step(path, step))
    kept = [n for n in reader.steps(path) if n <= last][-average:]
    if average < 1 or len(kept) < average:
        raise ValueError(
            f"cannot average {average} checkpoints: {path} has {len(kept)} up to step {last}. "
            "Give a number from 1 to that, or keep more (checkpoint.keep)"
        )
    variables = state.get("average") or state["variables"]
    if average > 1:
        total = jax.tree.map(np.float64, variables)
        for earlier in kept[:-1]:
            _, state, _ = reader.read(path, earlier)
            total = jax.tree.map(np.add, total, state.get("average") or state["variables"])
        variables = jax.tree.map(lambda t, v: (t / average).astype(v.dtype), total, variables)
    return last, variables, metadata
