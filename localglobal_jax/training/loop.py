# SPDX-License-Identifier: Apache-2.0
"""The loop. It knows steps, states and batches; what a batch means is the task's affair.

Order inside the loop: evaluate, save, next batch, step, report. So the position in the data that a
checkpoint holds (its step: batch n is a function of the seed and n) always matches its state, and
a resumed run repeats nothing and skips nothing.
"""

import logging
import pathlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from localglobal_jax.checkpoints.workdir import Lock, named_in_errors
from localglobal_jax.config import schema, validation
from localglobal_jax.parallel import multihost
from localglobal_jax.parallel import placement as parallel
from localglobal_jax.training import divergence
from localglobal_jax.training import evaluation as evaluate
from localglobal_jax.training.reporting.examples import ExampleLogger
from localglobal_jax.training.reporting.provenance import environment, versions
from localglobal_jax.training.reporting.run import MetricLogger, finish, log_run_header
from localglobal_jax.training.setup import prepare_setup, reserve
from localglobal_jax.training.step import make_update
from localglobal_jax.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)


class Preempted(Exception):
    """Asked to stop, and the state is saved (exit code 42)."""


def train(
    config: schema.Run | ConfigDict, workdir: str | pathlib.Path
) -> dict[str, dict[str, float]]:
    """Trains, or resumes, the run `config` in `workdir`; returns its last metrics by split.

    A ConfigDict is validated first, see `config.loading.load_config`.

    Raises:
      ValueError: the config is wrong, or does not fit the workdir; nothing was written.
      Locked: another run is under way in this workdir.
      Preempted: after a SIGTERM, once the state is saved.
      Diverged: a loss, a gradient or the state is not finite.
    """
    run = config if isinstance(config, schema.Run) else validation.check(config)
    with Lock() as lock, named_in_errors(workdir):
        return _train(run, workdir, lock)


def _train(
    run: schema.Run, directory: str | pathlib.Path, lock: Lock
) -> dict[str, dict[str, float]]:
    # ---- set up: all that can refuse comes first
    session = prepare_setup(run, directory)
    copy, placement, task = session.copy, session.placement, session.task
    name, directory = pathlib.PurePath(directory).name, copy.local
    trace = Trace(run, directory)
    evaluation = evaluate.Evaluation(task, placement)
    samples = ExampleLogger(run, directory)
    evaluation.check_metric(run.checkpoint.best)

    parallel.use_compilation_cache(run.parallel.compilation_cache)

    # ---- state: restored, or made
    reserve(run, task, copy, lock)
    checkpoints = session.checkpoints(run)
    start, state, before = session.restore(checkpoints) or session.begin()
    params = session.template.variables["params"]
    log_run_header(run, task, params, start)

    update = make_update(task, session.optimizer, run)
    step_fn = placement.compile_step(update, session.template)
    about: dict[str, Any] = {"config": run.model_dump(mode="json"), "model": dict(task.model_spec)}
    about |= {"versions": versions(), "environment": environment(), "order": task.order}
    about["labels"] = task.labels

    # ---- loop: evaluate, save, next batch, step, report (do not change the order)
    window = ThroughputMeter(run, task, start, before.get("window"), session.work_of(update))
    watch = divergence.DivergenceMonitor(run, params, directory, start, before.get("skipped", 0))
    batches = task.train_batches(start, run.steps)
    with (
        copy.kept(multihost.rank() == 0),
        multihost.stop_requests() as asked_to_stop,
        closing(checkpoints),
        closing(trace),
        closing(
            MetricLogger(run, task, directory, start, before.get("metrics_crc32"), name=name)
        ) as output,
    ):
        for step in range(start, run.steps + 1):
            last, new, results = step == run.steps, step > start, {}
            stopping = asked_to_stop(step)  # once: a signal may come between two lines
            if new and (last or due(step, run.eval.every)):
                with window.paused():
                    variables = state.average or state.variables
                    results = evaluation(variables)
                    output.evaluation(step, results, samples(task, variables))
            if new and (last or stopping or due(step, run.checkpoint.every)):
                with window.paused():
                    watch.saving(step, state)  # what is not finite is never saved
                    written = output.flush()  # a checkpoint knows no more than the file beside it
                    if multihost.rank() == 0:
                        copy.push()
                    named = {f"{s}/{k}": v for s, line in results.items() for k, v in line.items()}
                    metadata = {"window": window.partial(), "skipped": watch.skipped}
                    metadata |= {**about, "metrics_crc32": written}
                    checkpoints.save(step, state, metadata=metadata, metrics=named)
            if last:
                break
            if stopping:
                saved = "the state is saved" if step else "nothing was done yet"
                raise Preempted(f"stopped at step {step} of {run.steps}; {saved}")
            with window.waiting():
                batch = next(batches)
            with trace.step(step), window.compiling(batch):
                state, outcome = step_fn(state, placement.train_batch(batch))
                trace.wait_for(outcome)
            watch.add(step, outcome, batch["index"])
            window.add(outcome.metrics)
            if step + 1 == run.steps or due(step + 1, run.log.every):
                watch.settle()
                output.training(step + 1, window.close(step + 1) | watch.line())
    results = finish(run, task, directory, params)
    if multihost.rank() == 0:
        copy.push()
    return results


def due(step: int, every: int) -> bool:
    """Is `step` one of every n-th? 0 means never."""
    return every > 0 and step % every == 0


class Trace:
    """Traces the steps of ``log.profile = (first, steps)`` into ``workdir/profile``, for xprof."""

    # Python's own calls are left out. XLA switches them on and off by walking the states of all
    # threads, before Python 3.12 without their lock: a native thread that comes to Python just
    # then, as a checkpoint's writers do, can end the process (SIGSEGV).
    OPTIONS = jax.profiler.ProfileOptions()
    OPTIONS.python_tracer_level = 0

    def __init__(self, run: schema.Run, directory: pathlib.Path):
        self._first, count = run.log.profile or (run.steps, 0)
        self._stop = self._first + count
        self._path, self._on = str(directory / "profile"), False
        if self._stop > run.steps:
            raise ValueError(
                f"log.profile={run.log.profile} would trace steps up to {self._stop}, "
                f"but the run has {run.steps}"
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one step."""
        if not self._on and self._first <= step < self._stop:
            jax.profiler.start_trace(self._path, profiler_options=self.OPTIONS)
            self._on = True
        yield
        if step + 1 == self._stop:
            self.close()

    def wait_for(self, value: PyTree) -> None:
        """While tracing, until `value` is computed: else the trace would end before the work."""
        if self._on:
            jax.block_until_ready(value)

    def close(self) -> None:
        """Writes the trace, if one is on."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
