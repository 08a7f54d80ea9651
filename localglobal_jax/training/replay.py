# SPDX-License-Identifier: Apache-2.0
"""Computes one step of a run again, to see what was wrong with it. Writes nothing.

Batches are a function of the seed and the step, and so is a step's randomness: from the checkpoint
before it the same numbers come out, on any number of hosts.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost
from localglobal_jax.training import divergence
from localglobal_jax.training.setup import prepare_setup
from localglobal_jax.training.step import make_update
from localglobal_jax.training.tasks import HostBatch

log = logging.getLogger(__name__)


def replay(run: schema.Run, directory: str | pathlib.Path, step: int) -> dict[str, Any]:
    """What happened in the update from `step` to ``step + 1``.

    Returns ``step``, ``from`` (the checkpoint that it was computed from), ``finite``, ``loss``,
    ``gradient_norm``, ``parameters`` (those whose gradient is not finite), ``records`` (of the
    batch), ``inputs`` (arrays of the batch that are not finite) and ``alone``: the records that
    make a step go wrong by themselves, in a batch that holds nothing else (None on many hosts, and
    if nothing went wrong). Raises ValueError if there is no such step or no such run.
    """
    if not 0 <= step < run.steps:
        raise ValueError(f"--replay {step}: the run has the steps 0 to {run.steps - 1}")
    if run.parallel.compile == "pmap":
        raise ValueError(
            "--replay computes with parallel.compile=jit: give that too. Dropout then draws other "
            "numbers than the devices of a pmap did"
        )
    session = prepare_setup(run, directory)
    if not (session.copy.local / "config.json").exists():
        raise ValueError(f"--replay {step}: {directory} holds no run (it has no config.json)")
    placement, task = session.placement, session.task
    checkpoints = session.checkpoints(run)
    before = [saved for saved in checkpoints.steps() if saved <= step]
    restored = session.restore(checkpoints, max(before)) if before else None
    start, state, _ = restored or session.begin()
    if checkpoints.steps() and not before:
        log.warning("no checkpoint is as old as step %d any more: computing from step 0", step)
    log.info("replay   steps %d to %d", start, step)

    update = make_update(task, session.optimizer, run)
    step_fn = placement.compile_step(update, session.template)
    for batch in task.train_batches(start, step):
        state, _ = step_fn(state, placement.train_batch(batch))
    batch = next(task.train_batches(step, step + 1))
    optim = run.optim.model_copy(update={"skip_nonfinite": 0})  # a skipped step says nothing
    bare = make_update(task, session.optimizer, run.model_copy(update={"optim": optim}))
    look = placement.compile_eval(lambda state, batch: bare(state, batch)[1])  # keeps the state

    def outcome_of(batch: HostBatch) -> divergence.Outcome:
        return jax.device_get(look(state, placement.global_batch(batch)))

    outcome = outcome_of(batch)
    alone = None
    if not outcome.finite.all() and multihost.count() == 1:
        alone = sorted(
            int(record)
            for row, record in enumerate(batch["index"])
            if not outcome_of(_only(batch, row)).finite.all()
        )
    _, parameters = divergence.wrong(outcome.finite, state.variables["params"])
    loss, norm = (outcome.metrics[name] for name in ("loss", "gradient_norm"))
    return {
        "step": step,
        "from": start,
        "finite": bool(outcome.finite.all()),
        "loss": float(loss[0] / loss[1]),
        "gradient_norm": float(norm[0]),
        "parameters": parameters,
        "records": sorted({int(i) for i in multihost.all_gather(batch["index"])}),
        "inputs": [name for name, x in batch.items() if not np.isfinite(x).all()],
        "alone": alone,
    }


def _only(batch: HostBatch, row: int) -> HostBatch:
    """A batch of the same shape in which every row is `row`."""
    return {name: np.repeat(x[row : row + 1], len(x), axis=0) for name, x in batch.items()}
