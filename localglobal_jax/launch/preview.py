# SPDX-License-Identifier: Apache-2.0
"""Checks every run of a sweep as training would, and describes it.

Uses no network, writes nothing and needs no data: mock data of the right shapes replaces it.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from localglobal_jax.checkpoints import workdir
from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.config import schema, values
from localglobal_jax.launch import expand, status
from localglobal_jax.launch.backend import Target
from localglobal_jax.parallel import placement
from localglobal_jax.training import freezing, metrics, optim, step, tasks


class Preview:
    """Describes runs; runs with the same model and data share one count of parameters."""

    def __init__(self, base: schema.Run, target: Target | None = None):
        """`target`: devices and hosts of a run; None: one process with this process's devices."""
        self._base, self._hosts = base, target.hosts if target else 1
        self._devices = placement.placeholder_devices(target.devices if target else None)
        self._known: dict[str, tuple[Any, list[str]]] = {}

    def row(self, described: expand.Description) -> dict[str, Any]:
        """Returns the description of a run. Raises ValueError if it is invalid."""
        run = described.run
        partitioner = placement.Partitioner(run.parallel, self._devices)
        step.check_batches(run, partitioner)
        optim.make_optimizer(run.optim, run.steps)
        params, names = self._model(run)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        freezing.trained(params, run.optim.freeze)
        if run.optim.layer_decay < 1:
            optim.layer_numbers(params)
        metrics.check_best(run.checkpoint.best, names)
        remote = is_remote(described.workdir)
        if not remote:
            workdir.refuse_other(run, pathlib.Path(described.workdir))
        found = None if remote else status.latest_step(pathlib.Path(described.workdir))
        difference = values.difference(self._base.model_dump(), run.model_dump())
        return {
            "index": described.index,
            "name": described.name,
            "overrides": dict(described.overrides),
            "difference": {k: list(v) for k, v in difference.items()},
            "batch_size": run.batch_size,
            "per_device": run.batch_size / partitioner.batch_parts,
            "accumulate": run.optim.accumulate,
            "unit": "tokens" if isinstance(run.data, schema.Text) else "images",
            "model": run.model["name"],
            "parameters": parameters,
            "mesh": dict(partitioner.mesh.shape),
            "strategy": run.parallel.strategy,
            "devices": len(self._devices),
            "hosts": self._hosts,
            "steps": status.steps_of(run, described.workdir, found),
            "workdir": described.workdir,
            "latest_step": found,
            "remote": remote,
        }

    def _model(self, run: schema.Run) -> tuple[Any, list[str]]:
        """Returns the shapes of the parameters, and the names of the metrics of evaluation."""
        what = run.model_dump(mode="json", include={"model", "data", "task", "dtype", "init"})
        key = json.dumps(what, sort_keys=True)
        if key not in self._known:
            text = isinstance(run.data, schema.Text)
            made_up = {"mock": True} if text else {"mock": True, "in_memory": False}
            mock = run.model_copy(update={"data": run.data.model_copy(update=made_up)})
            task = tasks.create_task(mock, train=text)

            def init(*inputs: Any) -> Any:
                return task.model.init(jax.random.key(0), *inputs, train=False)

            params = jax.eval_shape(init, *task.inputs)["params"]
            names = [f"{s}/{m}" for s, e in task.evaluators.items() for m in e.metric_names]
            self._known[key] = params, names
        return self._known[key]


def text(row: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Returns the description of one run as text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items())
    hosts = f" on {row['hosts']} hosts" if row["hosts"] > 1 else ""
    accumulate = f" in {row['accumulate']} parts" if row["accumulate"] > 1 else ""
    there = "not looked up" if row["remote"] else "no checkpoint there"
    if row["latest_step"] is not None:
        done = row["latest_step"] >= row["steps"]
        there = "done" if done else f"resumes at step {row['latest_step']:,}"
    lines = [
        ("overrides", expand.shown(row["overrides"])),
        *(("differs", f"{k}: {a!r} -> {b!r}") for k, (a, b) in row["difference"].items()),
        (
            "batch",
            f"{row['batch_size']:,} {row['unit']}{accumulate}, {row['per_device']:,g} per device",
        ),
        ("model", f"{row['model']}, {row['parameters']:,} parameters"),
        ("mesh", f"{mesh} ({row['strategy']}){hosts}"),
        ("steps", f"{row['steps']:,}; {there}"),
        ("workdir", row["workdir"]),
        *(("command", command) for command in commands),
    ]
    return "\n".join([row["name"], *(f"  {what:<10}{value}" for what, value in lines)])


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the totals of all runs."""
    left = [max(0, row["steps"] - (row["latest_step"] or 0)) for row in rows]
    parameters = [row["parameters"] for row in rows]
    return {
        "runs": len(rows),
        "done": sum(n == 0 for n in left),
        "steps": sum(row["steps"] for row in rows),
        "steps_left": sum(left),
        "examples_left": sum(n * row["batch_size"] for n, row in zip(left, rows, strict=True)),
        "parameters": [min(parameters), max(parameters)],
        "models": len({(row["model"], row["parameters"]) for row in rows}),
    }


def summary(about: Mapping[str, Any]) -> str:
    """Returns the totals as text."""
    low, high = about["parameters"]
    commit = about["git"].get("commit", "none")[:12]
    dirty = ", with uncommitted changes" if about["git"].get("dirty") else ""
    runs, models = (
        f"{about[name]} {name if about[name] != 1 else name[:-1]}" for name in ("runs", "models")
    )
    lines = [
        f"{runs} ({about['done']} done): {about['steps_left']:,} of {about['steps']:,} steps left",
        f"{models} of {low:,}{f' to {high:,}' if high > low else ''} parameters",
        f"backend {about['backend']}, image {about['image'] or 'none'}, git {commit}{dirty}",
    ]
    if about["scripts"]:
        lines.append(f"scripts (--out writes them): {' '.join(about['scripts'])}")
    if about["env"]:
        lines.append("environment: " + " ".join(f"{k}={v}" for k, v in about["env"].items()))
    return "\n".join(lines)
