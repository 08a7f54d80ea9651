# SPDX-License-Identifier: Apache-2.0
"""Evaluators, inside the loop or on a saved checkpoint; and a trained model back from its files."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from localglobal_jax import configlib, metrics, parallel, schema, stored
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


def evaluate(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Evaluates a checkpoint of `workdir` (the newest, or `step`): its step and all metrics."""
    workdir = pathlib.Path(workdir)
    run = read_run(workdir)
    mesh = parallel.make_mesh(run.parallel.mesh)
    task = create_task(run, shard=(parallel.host(), parallel.hosts()))
    found, state, _ = stored.read(workdir, step)
    variables = jax.device_put(
        state.get("average") or state["variables"], parallel.replicated(mesh)
    )
    return found, Evaluation(task, mesh)(variables)


def read_run(workdir: pathlib.Path) -> schema.Run:
    """The config that `workdir` was trained with."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{workdir} is not a workdir: it has no config.json. "
            "Give the directory that `localglobal train --workdir` wrote to"
        )
    return configlib.from_json(file.read_text())


def load(path: str | pathlib.Path, step: int | None = None) -> tuple[nn.Module, Variables]:
    """A trained model from our checkpoints: ``(module, variables)``, ready for ``module.apply``.

    `path` is a workdir, its checkpoints folder, or one step's folder. The averaged variables are
    given if the run kept an average. Needs neither the data set nor the config.
    """
    _, state, metadata = stored.read(path, step)
    spec: dict[str, Any] = configlib.tuples(metadata["model"])
    return create_model(**spec), jax.device_put(state.get("average") or state["variables"])
