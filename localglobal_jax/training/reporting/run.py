# SPDX-License-Identifier: Apache-2.0
"""Reports of a run at its start, during training and at its end; only rank 0 reports."""

import logging
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from localglobal_jax.checkpoints.workdir import is_remote, shown, write_atomically
from localglobal_jax.config import preprocessing, schema
from localglobal_jax.parallel import multihost, placement
from localglobal_jax.training import freezing, optim
from localglobal_jax.training.reporting import (
    metrics_log,
    model_card,
    plots,
    progress,
    provenance,
)
from localglobal_jax.training.reporting.provenance import environment, versions
from localglobal_jax.training.tasks import Task

log = logging.getLogger(__name__)
# fields of a line of metrics, beside those of the model
OF_THE_MACHINE = ("seconds_left", "input_wait", "memory_bytes", "compile_seconds", "mfu")
OF_THE_RUN = ("step", "split", "learning_rate", "gradient_norm")


def log_run_header(run: schema.Run, task: Task, params: PyTree, start: int) -> None:
    """Logs the parameters, the data, the devices and the steps of a run."""
    if multihost.rank():
        return
    log.info("%s", progress.parameter_table(params))
    if run.optim.freeze:
        log.info("freeze   %s", freezing.summary(params, run.optim.freeze))
    if run.optim.layer_decay < 1:
        log.info("layers   %s", optim.layer_summary(params, run.optim))
    for summary in (task.summary, *(split.summary for split in task.evaluators.values())):
        if summary:
            log.info("data     %s", summary)
    log.info("devices  %s", placement.describe())
    done = f", resumed at step {start}" if start else ""
    log.info("run      %d steps of %d %s%s", run.steps, run.batch_size, task.items, done)


class MetricLogger:
    """Writes the metrics file, TensorBoard and the progress line; does nothing on other ranks."""

    def __init__(
        self,
        run: schema.Run,
        task: Task,
        directory: pathlib.Path,
        start: int,
        expected: int | None = None,
        *,
        name: str = "",
    ):
        self._items, self._steps = task.items, run.steps
        self._writer = self._progress = None
        if multihost.rank() == 0:
            self._writer = metrics_log.Writer(
                directory,
                resume_step=start,
                tensorboard=run.log.tensorboard,
                wandb=run.log.wandb,
                config=run.model_dump(mode="json"),
                name=name,
                expected=expected,
            )
            self._progress = progress.Progress()

    def training(self, step: int, line: Mapping[str, float]) -> None:
        """Reports the means of the steps since the last report."""
        if self._writer and self._progress:
            self._writer.write(step, "train", line)
            self._progress.show(
                progress.progress_line(
                    step,
                    self._steps,
                    loss=line["loss"],
                    rate=line[f"{self._items}_per_second"],
                    items=self._items,
                    seconds=line["seconds_left"],
                    waiting=line["input_wait"],
                    mfu=line.get("mfu"),
                )
            )

    def evaluation(
        self,
        step: int,
        results: Mapping[str, Mapping[str, float]],
        shown: Mapping[str, str | np.ndarray],
    ) -> None:
        """Reports the metrics of an evaluation, and its examples `shown`."""
        if self._writer and self._progress:
            if shown:
                self._writer.show(step, shown)
            for split, line in results.items():
                self._writer.write(step, split, line)
                text = "  ".join(f"{name} {short(value)}" for name, value in line.items())
                self._progress.print(f"step {step}  {split}: {text}")

    def note(self, text: str) -> None:
        """Shows a line of text."""
        if self._progress:
            self._progress.print(text)

    def flush(self) -> int | None:
        """Returns the `metrics_log.checksum` once it is on the disk; None on other ranks."""
        if self._writer:
            self._writer.flush()
        return self._writer.checksum if self._writer else None

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer and self._progress:
            self._progress.close()
            self._writer.close()


def short(value: float) -> str:
    """Returns a metric with five digits, and a count with all."""
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def of_the_machine(name: str) -> bool:
    """Returns whether a field of a training line measures the machine, not the model."""
    return name in OF_THE_MACHINE or name.endswith("_per_second")


def model_results(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line of metrics that measure the model."""
    return {k: v for k, v in line.items() if k not in OF_THE_RUN and not of_the_machine(k)}


def _preparation(run: schema.Run) -> dict[str, Any]:
    """Returns how images are prepared for the model, by field of the config; {} of text."""
    return preprocessing.of_checkpoint({"config": run.model_dump()})


def _environment(source: str | None, directory: pathlib.Path) -> dict[str, str]:
    """Returns the environment and, if there is one, a link to the page about the config."""
    found = environment(source)
    if page := provenance.page_of(found.get("config", ""), directory):
        path, url = page
        found["page"] = path if is_remote(shown(directory)) else f"[{path}]({url})"
    return found


def finish(  # noqa: PLR0917 # parts of one run
    run: schema.Run,
    task: Task,
    directory: pathlib.Path,
    params: PyTree,
    step: int,
    source: str | None = None,
    *,
    trained: bool = True,
) -> dict[str, dict[str, float]]:
    """Writes `model_card.md` and the learning curve; returns the last metrics. Rank 0 only.

    Args:
      trained: whether this process did any step. Else a card that is there stays: its versions,
        environment and command are those of the training.
      step: the last one, fewer than ``steps`` if the run stopped early.
      source: the config file of the run, ``FILE[:arg]``.
    """
    last: dict[str, dict[str, float]] = {}
    if multihost.rank():
        return last
    lines = metrics_log.read_metrics(directory)
    for line in lines:
        last[line["split"]] = {k: v for k, v in line.items() if k != "split"}
    path = directory / "model_card.md"
    if path.exists() and not trained:
        return last
    drawn = any(name in line for line in lines for name in plots.PANELS)
    curve = plots.learning_curve(directory) if drawn else None
    card = model_card.model_card(
        name=f"{run.model['name']} on {run.data.name}",
        summary=f"A {run.task.name} model trained with localglobal_jax.",
        config=run.model_dump(mode="json"),
        data={"name": run.data.name, "training": task.summary, **_preparation(run)},
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        steps=step,
        metrics={split: model_results(line) for split, line in last.items()},
        use=task.use,
        versions=versions(),
        environment=_environment(source, directory),
        command=_command(),
        curve=curve.name if curve else None,
    )
    write_atomically(path, card)
    log.info("wrote %s", " and ".join(shown(file) for file in (path, curve) if file))
    return last


def _command() -> str | None:
    """Returns the command of this process; None if it is another program, as a notebook is."""
    program = pathlib.PurePath(sys.argv[0])
    package = __name__.partition(".")[0]
    if program.stem != "localglobal" and program.parts[-2:] != (package, "__main__.py"):
        return None
    command = shlex.join(["localglobal", *sys.argv[1:]])
    return command.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
