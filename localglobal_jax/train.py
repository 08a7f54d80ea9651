# SPDX-License-Identifier: Apache-2.0
"""The loop. It knows steps, states and batches; what a batch means is the task's affair.

Order inside the loop: evaluate, save, next batch, step, report. So the position in the data that a
checkpoint holds (its step: batch n is a function of the seed and n) always matches its state, and
a resumed run repeats nothing and skips nothing.
"""

import pathlib
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from localglobal_jax import checkpoint, conversion, evaluate, optim, parallel, schema, workdir
from localglobal_jax.run_report import Output, Window, announce, finish, versions
from localglobal_jax.tasks import Batch, create_task
from localglobal_jax.train_step import State, init_state, start_from, train_step


class Preempted(Exception):
    """Asked to stop, and the state is saved (exit code 42)."""


def train(run: schema.Run, directory: str | pathlib.Path) -> dict[str, dict[str, float]]:
    """Trains, or resumes, `run` in the workdir `directory`; returns its last metrics by split.

    Raises ValueError, before anything on disk is touched, if the run cannot be right; Preempted
    after a SIGTERM, once the state is saved; Diverged if the loss is not finite.
    """
    # ---- set up: all that can refuse comes first
    directory = pathlib.Path(directory).absolute()
    mesh = parallel.make_mesh(run.parallel.mesh)
    check_batches(run, mesh)
    workdir.refuse_other(run, directory)
    task = create_task(run, shard=(parallel.host(), parallel.hosts()))
    optimizer = optim.make_optimizer(run.optim, run.steps)
    init = parallel.compile_init(lambda: init_state(task, optimizer, run), mesh)
    template = parallel.with_sharding(jax.eval_shape(init), parallel.replicated(mesh))

    pretrained = conversion.pretrained(run.init, task.model, task.inputs[0]) if run.init else None

    # ---- state: restored, or made
    workdir.claim(run, directory)
    checkpoints = checkpoint.Checkpoints(directory / "checkpoints", run.checkpoint)
    restored = checkpoints.restore(template)
    start, state = (restored.step, restored.state) if restored else (0, init())
    if pretrained and not restored:
        state = start_from(state, pretrained)
    params = template.variables["params"]
    announce(run, task, params, start)

    # ---- compile
    def update(state: State, batch: Batch) -> tuple[State, PyTree]:
        return train_step(
            state, batch, task=task, optimizer=optimizer, options=run.optim, seed=run.seed
        )

    step_fn = parallel.compile_step(update, mesh)
    evaluation = evaluate.Evaluation(task, mesh)
    about = {"config": run.model_dump(mode="json"), "model": dict(task.model_spec)}
    about["versions"] = versions()

    # ---- loop: evaluate, save, next batch, step, report (do not change the order)
    window = Window(run, task, start, restored.metadata["window"] if restored else None)
    batches = task.train_batches(start, run.steps)
    with (
        stop_requests() as stop,
        closing(checkpoints),
        closing(Output(run, task, directory, start)) as output,
    ):
        for step in range(start, run.steps + 1):
            last, new, results = step == run.steps, step > start, {}
            stopping = stop.is_set()  # asked once: a signal may come between two lines
            if new and (last or due(step, run.eval.every)):
                with window.paused():
                    results = evaluation(state.average or state.variables)
                output.evaluation(step, results)
            if new and (last or stopping or due(step, run.checkpoint.every)):
                with window.paused():
                    output.flush()  # a checkpoint never knows more than the metrics beside it
                    named = {f"{s}/{k}": v for s, line in results.items() for k, v in line.items()}
                    metadata = {**about, "window": window.partial()}
                    checkpoints.save(step, state, metadata=metadata, metrics=named)
            if last:
                break
            if stopping:
                raise Preempted(f"stopped at step {step} of {run.steps}; the state is saved")
            with window.waiting():
                batch = next(batches)
            with profiled(run.log.profile, step, directory), window.compiling(step == start):
                state, sums = step_fn(state, parallel.global_batch(batch, mesh))
            window.add(sums)
            if step + 1 == run.steps or due(step + 1, run.log.every):
                output.training(step + 1, window.close(step + 1))
    return finish(run, task, directory, params)


def due(step: int, every: int) -> bool:
    """Is `step` one of every n-th? 0 means never."""
    return every > 0 and step % every == 0


def check_batches(run: schema.Run, mesh: Mesh) -> None:
    """Raises ValueError unless every batch divides over devices, hosts and micro-batches."""
    if run.batch_size % run.optim.accumulate:
        raise ValueError(
            f"batch_size={run.batch_size} is not divisible by optim.accumulate="
            f"{run.optim.accumulate} micro-batches"
        )
    what = "batch_size" if run.optim.accumulate == 1 else "batch_size / optim.accumulate"
    parallel.check_batch(run.batch_size // run.optim.accumulate, mesh, what=what)
    parallel.check_batch(run.eval.batch_size or run.batch_size, mesh, what="eval.batch_size")


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as schedulers send it before they take a machine away."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python allows handlers in the main thread only
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def profiled(window: tuple[int, int] | None, step: int, directory: pathlib.Path) -> Iterator[None]:
    """Traces `window` = (first step, steps) into ``directory/profile``, for xprof."""
    first, count = window or (-1, 0)
    if step == first:
        jax.profiler.start_trace(str(directory / "profile"))
    yield
    if window and step == first + count - 1:
        jax.profiler.stop_trace()
