# SPDX-License-Identifier: Apache-2.0
"""Evaluators, inside the loop or on a saved checkpoint; and a trained model back from its files."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from localglobal_jax import checkpoint, configlib, metrics, parallel, schema, stored
from localglobal_jax.models import create_model
from localglobal_jax.tasks import Evaluator, Task, Variables, create_task


class Evaluation:
    """Runs every evaluator of a task; each is compiled once, however often it runs."""

    def __init__(self, task: Task, mesh: Mesh):
        self._mesh = mesh
        self._evaluators = {
            name: (evaluator, parallel.compile_eval(evaluator.metrics, mesh))
            for name, evaluator in task.evaluators.items()
        }

    def check_metric(self, best: str | None) -> None:
        """Raises ValueError unless `best` ("test/accuracy", "-test/loss") will be measured."""
        known = [f"{s}/{m}" for s, (e, _) in self._evaluators.items() for m in e.metric_names]
        if best and best.removeprefix("-") not in known:
            raise configlib.unknown("metric in checkpoint.best:", best.removeprefix("-"), known)

    def __call__(self, variables: Variables) -> dict[str, dict[str, float]]:
        """``{split: {metric: value}}``."""
        return {
            name: self._run(name, evaluator, step, variables)
            for name, (evaluator, step) in self._evaluators.items()
        }

    def _run(
        self, name: str, evaluator: Evaluator, step: Any, variables: Variables
    ) -> dict[str, float]:
        total = None
        for batch in evaluator.batches():
            sums = jax.device_get(step(variables, parallel.global_batch(batch, self._mesh)))
            total = sums if total is None else metrics.merge(total, sums)
        result = metrics.compute(total or {})
        if result["count"] != evaluator.size():
            raise RuntimeError(
                f"evaluated {result['count']} of the {evaluator.size()} examples of {name}: "
                "a batch was lost or counted twice"
            )
        return result


def evaluate(
    workdir: str | pathlib.Path,
    step: int | str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Evaluates a checkpoint of `workdir`: its step and all metrics.

    `step`: a number, "best", or None for the newest. `overrides`: of the config it was trained
    with, e.g. ``{"data.dir": "/data"}`` on another machine.
    """
    workdir = pathlib.Path(workdir)
    config = ConfigDict(configlib.tuples(read_run(workdir).model_dump()))
    for field, text in (overrides or {}).items():
        configlib.override(config, field, text)
    run = configlib.check(config)
    mesh = parallel.make_mesh(run.parallel.mesh)
    parallel.check_batch(run.eval.batch_size or run.batch_size, mesh, what="eval.batch_size")
    task = create_task(run, shard=(parallel.host(), parallel.hosts()), train=False)
    found, state, _ = stored.read(workdir, find_step(workdir, step))
    variables = jax.device_put(
        state.get("average") or state["variables"], parallel.replicated(mesh)
    )
    return found, Evaluation(task, mesh)(variables)


def find_step(path: str | pathlib.Path, step: int | str | None) -> int | None:
    """The number of a step given as a number, as "best" (of a workdir), or as None: the newest."""
    if step is None or str(step).isdigit():
        return None if step is None else int(step)
    if step != "best":
        raise ValueError(f'step "{step}": give a number, or "best"')
    options = read_run(pathlib.Path(path)).checkpoint
    best = checkpoint.Checkpoints(pathlib.Path(path) / "checkpoints", options).best()
    if best is None:
        raise ValueError(f"no step of {path} has the metric checkpoint.best={options.best}")
    return best


def read_run(workdir: pathlib.Path) -> schema.Run:
    """The config that `workdir` was trained with."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{workdir} is not a workdir: it has no config.json. "
            "Give the directory that `localglobal train --workdir` wrote to"
        )
    return configlib.read_json(file)


def load(path: str | pathlib.Path, step: int | str | None = None) -> tuple[nn.Module, Variables]:
    """A trained model from our checkpoints: ``(module, variables)``, ready for ``module.apply``.

    `path` is a workdir, its checkpoints folder, or one step's folder; `step` a number, "best" (of
    a workdir), or None: the newest. The averaged variables are
    given if the run kept an average. Needs neither the data set nor the config.
    """
    _, state, metadata = stored.read(path, find_step(path, step))
    spec: dict[str, Any] = configlib.tuples(metadata["model"])
    return create_model(**spec), jax.device_put(state.get("average") or state["variables"])
