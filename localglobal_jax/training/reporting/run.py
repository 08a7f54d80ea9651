# SPDX-License-Identifier: Apache-2.0
"""What a run tells people: at its start, while it goes, at its end. Rank 0 speaks, others count."""

import logging
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from localglobal_jax.checkpoints.workdir import write_atomically
from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost, placement
from localglobal_jax.training import metrics, optim
from localglobal_jax.training.reporting import metrics_log, model_card
from localglobal_jax.training.tasks import HostBatch, Task

log = logging.getLogger(__name__)
# of a line of metrics
OF_THE_MACHINE = ("seconds_left", "input_wait", "memory_bytes", "compile_seconds", "mfu")
OF_THE_RUN = ("step", "split", "learning_rate", "gradient_norm")


def announce(run: schema.Run, task: Task, params: PyTree, start: int) -> None:
    """Parameters, data, devices and what is about to happen."""
    if multihost.rank():
        return
    log.info("%s", metrics_log.parameter_table(params))
    log.info("data     %s", task.summary)
    log.info("devices  %s", placement.describe())
    done = f", resumed at step {start}" if start else ""
    log.info("run      %d steps of %d %s%s", run.steps, run.batch_size, task.items, done)


class Window:
    """Sums the metrics of the steps between two reports, and says where the time went.

    `health.Watch` lets at most one step be in flight beyond the one being waited for, so that the
    clock tells what the device does. `partial` sums go into every checkpoint: a run that resumes
    inside a window reports the same means as one that was never stopped.

    `work` says of a batch how many multiply-adds its step is; without it there is no MFU.
    """

    def __init__(
        self,
        run: schema.Run,
        task: Task,
        start: int,
        partial: Mapping[str, Any] | None = None,
        work: Callable[[HostBatch], int] | None = None,
    ):
        self._run, self._items, self._work = run, task.items, work
        self._schedule = jax.jit(optim.make_schedule(run.optim, run.steps))  # one program, not ten
        self._peak = multihost.peak_flops() if work else None
        self._compiled: dict[Any, float] = {}  # shape of a batch -> FLOPs of its step
        self._open(start)
        if partial and partial["sums"]:
            self._first = partial["first"]
            self._items_before = int(partial["sums"]["loss"][1])
            self._sums.append({k: (v[0], v[1]) for k, v in partial["sums"].items()})

    def _open(self, step: int) -> None:
        self._first, self._began = step, time.perf_counter()
        self._steps = self._items_before = 0  # of this process; of the one that was interrupted
        self._waited = self._paused = self._compiling = self._flops = 0.0
        self._sums: list[PyTree] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for input."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextmanager
    def compiling(self, batch: HostBatch) -> Iterator[None]:
        """Around a step; the first of every shape compiles, which is no training either."""
        shapes = tuple((name, x.shape) for name, x in batch.items())
        began = time.perf_counter()
        yield
        if shapes not in self._compiled:
            seconds = time.perf_counter() - began
            if multihost.rank() == 0:
                log.info("compiled in %.1f s", seconds)
            self._compiling += seconds
            self._compiled[shapes] = self._count(batch)
            self._paused += time.perf_counter() - began
        self._flops += self._compiled[shapes]

    def _count(self, batch: HostBatch) -> float:
        """FLOPs of a step; where nobody asks, or they cannot be counted, 0."""
        if self._work is None or not self._peak or multihost.rank():
            return 0.0
        try:
            return 2.0 * self._work(batch)
        except ValueError as error:  # a loop whose length is not in the program
            log.info("no MFU: %s", error)
            self._peak = None
            return 0.0

    def add(self, sums: PyTree) -> None:
        """One step's metrics, still on the device."""
        self._sums.append(sums)
        self._steps += 1

    def _total(self) -> dict[str, tuple[Any, Any]]:
        total, *rest = jax.device_get(self._sums) or [{}]
        for sums in rest:
            total = metrics.merge(total, sums)
        self._sums = [total] if total else []
        return total

    def partial(self) -> dict[str, Any]:
        """What `__init__` needs to go on, as JSON: float32 survives it exactly."""
        sums = {k: [np.asarray(v).item() for v in pair] for k, pair in self._total().items()}
        return {"first": self._first, "sums": sums}

    def close(self, step: int) -> dict[str, float]:
        """The means over the window."""
        total = self._total()
        items = int(total["loss"][1]) - self._items_before
        line = metrics.compute(total)
        del line["count"]
        seconds = time.perf_counter() - self._began - self._paused
        line["learning_rate"] = float(self._schedule(step - 1))
        line[f"{self._items}_per_second"] = items / seconds
        line["steps_per_second"] = self._steps / seconds
        line["seconds_left"] = (self._run.steps - step) * seconds / self._steps
        line["input_wait"] = self._waited / seconds
        line["memory_bytes"] = multihost.peak_bytes()
        if self._compiling:
            line["compile_seconds"] = self._compiling
        if self._peak:
            line["mfu"] = self._flops / seconds / self._peak
        self._open(step)
        return line


class Output:
    """The metrics file, TensorBoard and the progress line; nothing but on rank 0."""

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
            self._progress = metrics_log.Progress()

    def training(self, step: int, line: Mapping[str, float]) -> None:
        """Reports the steps of a window."""
        if self._writer and self._progress:
            self._writer.write(step, "train", line)
            self._progress.show(
                metrics_log.progress_line(
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
        """Reports what the evaluators said, and shows examples."""
        if self._writer and self._progress:
            if shown:
                self._writer.show(step, shown)
            for split, line in results.items():
                self._writer.write(step, split, line)
                said = "  ".join(f"{name} {value:.5g}" for name, value in line.items())
                self._progress.print(f"step {step}  {split}: {said}")

    def flush(self) -> int | None:
        """Returns once everything is on the disk; what was written, as `reporting.checksum`."""
        if self._writer:
            self._writer.flush()
        return self._writer.checksum if self._writer else None

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer and self._progress:
            self._progress.close()
            self._writer.close()


def of_the_machine(name: str) -> bool:
    """Whether a number of a training line is the machine's doing, not the model's."""
    return name in OF_THE_MACHINE or name.endswith("_per_second")


def model_results(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of metrics says of the model."""
    return {k: v for k, v in line.items() if k not in OF_THE_RUN and not of_the_machine(k)}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = ("localglobal_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in packages}


def environment() -> dict[str, str]:
    """Where this process runs and, if its code is in a git checkout, of which commit."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": placement.describe(),
    }
    root = pathlib.Path(__file__).parents[3]
    if (root / ".git").exists():  # else git would tell of whatever is around an installed package
        # without locks: else git would write the index
        command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always"]
        command += ["--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(  # nosec B603 # an argument list, no shell
                command, capture_output=True, text=True, check=True, timeout=10
            )
            found["commit"] = done.stdout.strip()
    return found


def finish(
    run: schema.Run, task: Task, directory: pathlib.Path, params: PyTree
) -> dict[str, dict[str, float]]:
    """On host 0 writes `model_card.md` and the learning curve, and returns the last metrics."""
    last: dict[str, dict[str, float]] = {}
    if multihost.rank():
        return last
    for line in metrics_log.read_metrics(directory):
        last[line["split"]] = {k: v for k, v in line.items() if k != "split"}
    curve = metrics_log.learning_curve(directory)
    card = model_card.model_card(
        name=f"{run.model['name']} on {run.data.name}",
        summary=f"A {run.task.name} model trained with localglobal_jax.",
        config=run.model_dump(mode="json"),
        data={"name": run.data.name, "training": task.summary},
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        steps=run.steps,
        metrics={split: model_results(line) for split, line in last.items()},
        use=task.use,
        versions=versions(),
        environment=environment(),
        command=shlex.join(["localglobal", *sys.argv[1:]]) if sys.argv[1:] else None,
        curve=curve.name,
    )
    write_atomically(directory / "model_card.md", card)
    log.info("wrote %s and %s", directory / "model_card.md", curve)
    return last
