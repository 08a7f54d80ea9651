# SPDX-License-Identifier: Apache-2.0
"""Measures a config on this machine: compile time, step time, items/s, wait for input.

Machines are noisy and drift, so two configs are measured in one process, in alternating steps, and
compared by the ratio of each pair of neighbouring steps.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.models import flops
from localglobal_jax.parallel import chips, placement
from localglobal_jax.profiling.compile import evaluated
from localglobal_jax.training import optim
from localglobal_jax.training.reporting.provenance import versions
from localglobal_jax.training.step import check_batches, init_state, make_update
from localglobal_jax.training.tasks import HostBatch, Task, create_task

WARM_UP = 2  # steps: allocators, caches, threads


class BenchmarkedStep:
    """A run with its state on the devices and its step compiled for every batch shape.

    `step`: "train", "eval" (the first evaluator's metrics) or "decode" (its predictions).
    """

    def __init__(self, run: schema.Run, step: str = "train"):
        if run.parallel.compile == "pmap":
            raise ValueError("bench compiles with jit: set parallel.compile=jit (the same losses)")
        self.run, self.train = run, step == "train"
        self.placement = placement.Partitioner(run.parallel)
        check_batches(run, self.placement)
        self.task: Task = create_task(run, shard=self.placement.shard)
        optimizer = optim.make_optimizer(run.optim, run.steps)
        init = self.placement.compile_init(lambda: init_state(self.task, optimizer, run))
        self._state = init()
        if self.train:
            template = self.placement.template(jax.eval_shape(lambda: self._state))
            self._function: Any = make_update(self.task, optimizer, run)
            self._step: Any = self.placement.compile_step(self._function, template)
        else:
            self._state = self._state.average or self._state.variables
            self._function = evaluated(run, self.task, step)
            self._step = self.placement.compile_eval(self._function)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def batches(self) -> Iterator[HostBatch]:
        """Yields batches without end in evaluation, and for all steps in training."""
        if self.train:
            yield from self.task.train_batches(0, self.run.steps)
        while not self.train:
            yield from next(iter(self.task.evaluators.values())).batches()

    def prepare(self, batch: HostBatch) -> None:
        """Compiles the step for the batch's shape, if that has not been done."""
        key = tuple((name, x.shape) for name, x in batch.items())
        if key not in self._compiled:
            began = time.perf_counter()
            lowered = self._step.lower(self._state, self.placement.global_batch(batch))
            self._compiled[key] = lowered.compile()
            self.compile_seconds += time.perf_counter() - began

    def __call__(self, batch: HostBatch) -> Any:
        """Runs one step; its result may still be computing."""
        key = tuple((name, x.shape) for name, x in batch.items())
        found = self._compiled[key](self._state, self.placement.global_batch(batch))
        if self.train:
            self._state, found = found
        return found

    def multiply_adds(self, batch: HostBatch) -> int | None:
        """Counts the multiply-adds of one step from shapes; None if a loop's length is unknown."""
        try:
            return flops.multiply_adds(self._function, self._state, batch)
        except ValueError:  # decoding stops when it is done
            return None


def measure(
    runs: Sequence[schema.Run], *, step: str = "train", steps: int = 20
) -> list[dict[str, Any]]:
    """Returns one report per run; steps of all runs alternate, each on one batch.

    Variables are newly initialised, which determines the length of decoding. The states of all runs
    are in memory at once. MFU is the share of the peak in bfloat16, whatever the dtype.

    Raises ValueError for an invalid run, or one not longer than `steps`.
    """
    if steps < 2:
        raise ValueError(f"--steps {steps}: a median needs at least 2")
    for run in runs:
        if step == "train" and run.steps <= steps:
            raise ValueError(
                f"--steps {steps}: the config has no more than steps={run.steps}. Ask for fewer"
            )
    subjects = [BenchmarkedStep(run, step) for run in runs]
    batches = [next(subject.batches()) for subject in subjects]
    for subject, batch in zip(subjects, batches, strict=True):
        subject.prepare(batch)
        for _ in range(WARM_UP):
            jax.block_until_ready(subject(batch))
    seconds = np.zeros((steps, len(runs)))
    for row in seconds:
        for i, (subject, batch) in enumerate(zip(subjects, batches, strict=True)):
            began = time.perf_counter()
            jax.block_until_ready(subject(batch))
            row[i] = time.perf_counter() - began
    reports = []
    for i, (subject, batch) in enumerate(zip(subjects, batches, strict=True)):
        report = described(subject, batch, seconds[:, i]) | {"step": step}
        report |= with_input(subject, steps)
        if i:
            more = float(batch["mask"].sum()) / float(batches[0]["mask"].sum())
            report["times_as_fast_as_first"] = spread(more * seconds[:, 0] / seconds[:, i])
        reports.append(report)
    return reports


def described(subject: BenchmarkedStep, batch: HostBatch, seconds: np.ndarray) -> dict[str, Any]:
    """Returns the measurements of a step that took `seconds` on `batch`."""
    items, median = int(batch["mask"].sum()), float(np.median(seconds))
    device = subject.placement.mesh.devices.flat[0].device_kind
    counted = subject.multiply_adds(batch)
    rate = 2 * counted / median / subject.placement.mesh.size if counted else None
    peak = chips.peak_flops(device)
    return {
        "devices": placement.describe(),
        "versions": versions(),
        "load": os.getloadavg()[0],  # of the machine, from other processes
        "items": subject.task.items,
        "batch": items,
        "compile_seconds": subject.compile_seconds,
        "step_ms": spread(1e3 * seconds),
        "items_per_second": items / median,
        "flops_per_device": rate,
        "mfu": rate / peak if rate and peak else None,
    }


def with_input(subject: BenchmarkedStep, steps: int) -> dict[str, Any]:
    """Measures the steps on new batches; returns the rate and the share of time spent waiting."""
    waited = total = items = 0.0
    batches = subject.batches()
    following = next(batches)
    for _ in range(steps):
        batch = following
        subject.prepare(batch)  # a new shape compiles, which is not waiting
        began = time.perf_counter()
        outcome = subject(batch)
        asked = time.perf_counter()
        following = next(batches)  # while the device computes, as in training
        waited += time.perf_counter() - asked
        jax.block_until_ready(outcome)
        total += time.perf_counter() - began
        items += float(batch["mask"].sum())
    return {"with_input": {"items_per_second": items / total, "input_wait": waited / total}}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}
