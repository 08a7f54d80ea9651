# SPDX-License-Identifier: Apache-2.0
"""Throughput of training: step time, wait for input, model FLOPs utilization (MFU)."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost
from localglobal_jax.training import metrics, optim
from localglobal_jax.training.tasks import HostBatch, Task

log = logging.getLogger(__name__)


class ThroughputMeter:
    """Sums the metrics of the steps between two reports (a window) and measures their time.

    `divergence.DivergenceMonitor` reads the outcome of a step while the next one runs, so the
    host is at most one step ahead of the device and its clock measures the device.

    Args:
      start: the first step of the run or of the resumed run.
      partial: the sums of an unfinished window, from the checkpoint (see `partial`), so that a
        resumed run reports the same means as an uninterrupted one.
      work: returns the multiply-adds of the step of a batch; without it no MFU is reported.
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
        self._schedule = jax.jit(
            optim.make_schedule(run.optim, run.steps)
        )  # compiled as one program
        self._peak = multihost.peak_flops() if work else None
        self._compiled: dict[Any, float] = {}  # shape of a batch -> FLOPs of its step
        self._open(start)
        if partial and partial["sums"]:
            self._first = partial["first"]
            self._items_before = int(partial["sums"]["loss"][1])
            self._sums.append({k: (v[0], v[1]) for k, v in partial["sums"].items()})

    def _open(self, step: int) -> None:
        self._first, self._began = step, time.perf_counter()
        self._steps = self._items_before = 0  # of this process; of the interrupted one
        self._waited = self._paused = self._compiling = self._flops = 0.0
        self._sums: list[PyTree] = []

    @property
    def steps(self) -> int:
        """Returns the number of steps of this process in the window."""
        return self._steps

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager around the wait for input."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager around evaluation and saving, whose time does not count."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextmanager
    def compiling(self, batch: HostBatch) -> Iterator[None]:
        """Context manager around a step; the first of a shape compiles, which does not count."""
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
        """Returns the FLOPs of a step; 0 if no MFU is reported or they cannot be counted."""
        if self._work is None or not self._peak or multihost.rank():
            return 0.0
        try:
            return 2.0 * self._work(batch)
        except ValueError as error:  # a loop whose length is not in the program
            log.info("no MFU: %s", error)
            self._peak = None
            return 0.0

    def add(self, sums: PyTree) -> None:
        """Adds the metrics of one step, still on the device."""
        self._sums.append(sums)
        self._steps += 1

    def _total(self) -> dict[str, tuple[Any, Any]]:
        total, *rest = jax.device_get(self._sums) or [{}]
        for sums in rest:
            total = metrics.merge(total, sums)
        self._sums = [total] if total else []
        return total

    def partial(self) -> dict[str, Any]:
        """Returns the unfinished window as JSON, which keeps float32 exactly, for `__init__`."""
        sums = {k: [np.asarray(v).item() for v in pair] for k, pair in self._total().items()}
        return {"first": self._first, "sums": sums}

    def close(self, step: int, skipped: int = 0) -> dict[str, float]:
        """Returns the means over the window, its speed and its memory, and begins a new window.

        `skipped`: the steps up to `step` that made no update (see `make_schedule`).
        """
        total = self._total()
        items = int(total["loss"][1]) - self._items_before
        line = metrics.compute(total)
        del line["count"]
        seconds = time.perf_counter() - self._began - self._paused
        line["learning_rate"] = float(self._schedule(max(0, step - 1 - skipped)))
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
