# SPDX-License-Identifier: Apache-2.0
"""The training loop, for every task.

Order inside the loop: evaluate, save, next batch, step, report. A checkpoint's position in the data
is its step (batch n is a function of the seed and n), so it always matches the state, and a resumed
run repeats no batch and skips none.
"""

import logging
import pathlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from localglobal_jax.checkpoints import store
from localglobal_jax.checkpoints.workdir import Lock, named_in_errors
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.parallel import multihost, placement
from localglobal_jax.training import divergence, freezing
from localglobal_jax.training.early_stopping import EarlyStopping
from localglobal_jax.training.evaluation import Evaluation
from localglobal_jax.training.reporting.examples import ExampleLogger
from localglobal_jax.training.reporting.provenance import environment, versions
from localglobal_jax.training.reporting.run import MetricLogger, finish, log_run_header
from localglobal_jax.training.setup import prepare_setup, reserve
from localglobal_jax.training.step import make_update
from localglobal_jax.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)


class Preempted(Exception):
    """A signal asked the run to stop, and the state is saved (exit code 42)."""


def train(
    config: schema.Run | ConfigDict, workdir: str | pathlib.Path, *, source: str | None = None
) -> dict[str, dict[str, float]]:
    """Trains, or resumes, the run `config` in `workdir`; returns its last metrics by split.

    Args:
      config: a ConfigDict is validated first, see `config.loading.load_config`.
      source: the file that `config` was loaded from, ``FILE[:arg]``; every checkpoint and the model
        card name it.

    Raises:
      ValueError: the config is wrong, or does not fit the workdir; nothing was written.
      Locked: another run is under way in this workdir.
      Preempted: after a SIGTERM, once the state is saved.
      Diverged: a loss, a gradient or the state is not finite.

    >>> config = lg.load_config("configs/coatnet_digits.py:size=tiny", data=dict(mock=True))
    >>> metrics = lg.train(config, "runs/digits")  # the same call again resumes, or returns at once
    >>> sorted(metrics["test"])
    ['accuracy', 'count', 'loss', 'step', 'top5']
    """
    run = validation.check(config)
    with store.one_end() as end_soon, Lock() as lock, named_in_errors(workdir):
        return _train(run, workdir, lock, end_soon, source)


def _train(
    run: schema.Run,
    directory: str | pathlib.Path,
    lock: Lock,
    end_soon: Callable[[], None],
    source: str | None,
) -> dict[str, dict[str, float]]:
    # ---- set up: everything is validated before anything is written
    setup = prepare_setup(run, directory)
    run, mirror, partitioner, task = setup.run, setup.mirror, setup.partitioner, setup.task
    name, directory = pathlib.PurePath(directory).name, mirror.local
    trace = Trace(run, directory)
    evaluation = Evaluation(task, partitioner)
    examples = ExampleLogger(run, directory)
    evaluation.check_metric(run.checkpoint.best)

    placement.use_compilation_cache(run.parallel.compilation_cache)

    # ---- state: restored, or initialized
    reserve(run, task, mirror, lock)
    checkpoints = setup.checkpoints()
    start, state, before = setup.restore(checkpoints) or setup.begin()
    setup.note_records()
    params = setup.template.variables["params"]
    log_run_header(run, task, params, start)

    update = make_update(task, setup.optimizer, run)
    step_fn = partitioner.compile_step(update, setup.template)
    description: dict[str, Any] = {
        "config": loading.with_absolute_paths(run).model_dump(mode="json"),
        "model": dict(task.model_spec),
    }
    description |= {"versions": versions(), "environment": environment(source)}
    description |= {"order": task.order, "labels": task.labels}

    # ---- loop: evaluate, save, next batch, step, report (do not change the order)
    throughput = ThroughputMeter(run, task, start, before.get("window"), setup.work_of(update))
    trained = freezing.trained(params, run.optim.freeze)
    monitor = divergence.DivergenceMonitor(run, trained, directory, start, before.get("skipped", 0))
    stopping_early = EarlyStopping(run, before)
    if stopping_early.done and start < run.steps and multihost.rank() == 0:
        log.info("stopped  at step %d already: %s. Nothing is done", start, stopping_early)
    batches = task.train_batches(start, run.steps)
    with (
        mirror.kept(multihost.rank() == 0),
        multihost.stop_requests(end_soon) as asked_to_stop,
        closing(checkpoints),
        closing(trace),
        closing(
            MetricLogger(run, task, directory, start, before.get("metrics_crc32"), name=name)
        ) as logger,
    ):
        for step in range(start, run.steps + 1):
            last = step == run.steps or stopping_early.done
            new, results = step > start, {}
            stopping = asked_to_stop(step)  # read once: a signal may arrive between two lines
            if new and (last or due(step, run.eval.every)):
                monitor.settle()  # no evaluation of a state that is not finite
                with throughput.paused():
                    variables = state.average or state.variables
                    results = evaluation(variables)
                    logger.evaluation(step, results, examples(task, variables))
                stopping_early.add(step, results)
                if stopping_early.done and not last:
                    last = True
                    if throughput.steps:
                        window = throughput.close(step, monitor.skipped)
                        logger.training(step, window | monitor.line())
                    logger.note(f"stopped early at step {step} of {run.steps}: {stopping_early}")
            if new and (last or stopping or due(step, run.checkpoint.every)):
                with throughput.paused():
                    monitor.saving(step, state)  # a state that is not finite is never saved
                    written = logger.flush()  # metrics reach the disk before the checkpoint
                    if multihost.rank() == 0:
                        mirror.push()
                    named = {f"{s}/{k}": v for s, line in results.items() for k, v in line.items()}
                    metadata = {"window": throughput.partial(), "skipped": monitor.skipped}
                    metadata |= {**description, "metrics_crc32": written, **stopping_early.state()}
                    checkpoints.save(step, state, metadata=metadata, metrics=named)
            if last:
                break
            if stopping:
                saved = "the state is saved" if step else "no step was done"
                raise Preempted(f"stopped at step {step} of {run.steps}; {saved}")
            with throughput.waiting():
                batch = next(batches)
            with trace.step(step), throughput.compiling(batch):
                state, outcome = step_fn(state, partitioner.train_batch(batch))
                trace.wait_for(outcome)
            monitor.add(step, outcome, batch["index"])
            throughput.add(outcome.metrics)
            if step + 1 == run.steps or due(step + 1, run.log.every):
                monitor.settle()
                window = throughput.close(step + 1, monitor.skipped)
                logger.training(step + 1, window | monitor.line())
    results = finish(run, task, directory, params, step, source, trained=step > start)
    if multihost.rank() == 0:
        mirror.push()
    return results


def due(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0


class Trace:
    """Traces the steps of ``log.profile = (first, steps)`` into ``workdir/profile``, for xprof."""

    # Without Python's own calls. XLA switches their tracing on and off by walking the states of all
    # threads, before Python 3.12 without their lock: a native thread that enters Python at that
    # moment, as a checkpoint's writers do, can end the process (SIGSEGV).
    OPTIONS = jax.profiler.ProfileOptions()
    OPTIONS.python_tracer_level = 0

    def __init__(self, run: schema.Run, directory: pathlib.Path):
        self._first, count = run.log.profile or (run.steps, 0)
        self._stop = self._first + count
        self._path, self._running = str(directory / "profile"), False
        if self._stop > run.steps:
            raise ValueError(
                f"log.profile={run.log.profile} would trace steps up to {self._stop}, "
                f"but the run has {run.steps}"
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context manager around one step; starts and ends the trace."""
        if not self._running and self._first <= step < self._stop:
            jax.profiler.start_trace(self._path, profiler_options=self.OPTIONS)
            self._running = True
        yield
        if step + 1 == self._stop:
            self.close()

    def wait_for(self, value: PyTree) -> None:
        """While tracing, waits for `value`; else the trace would end before the device's work."""
        if self._running:
            jax.block_until_ready(value)

    def close(self) -> None:
        """Ends the trace, if one is running, and writes it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
