# SPDX-License-Identifier: Apache-2.0
"""Throughput of training: step time, wait for input, FLOPs, model FLOPs utilisation."""

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
from localglobal_jax.training.reporting.run import log
from localglobal_jax.training.tasks import HostBatch, Task


class ThroughputMeter:
    """Sums the metrics of the steps between two reports, and says where the time went.

    `divergence.DivergenceMonitor` lets at most one step be in flight beyond the one being waited
    for, so that the clock tells what the device does. `partial` sums go into every
    checkpoint: a run that resumes inside a window reports the same means as one that was never
    stopped.

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
