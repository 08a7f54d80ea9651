# SPDX-License-Identifier: Apache-2.0
"""Computes one step of a run again, to find the cause of a divergence. Writes nothing.

Batches and randomness are functions of the seed and the step, so the same numbers result from the
checkpoint before the step, on any number of hosts.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np

from localglobal_jax.checkpoints import reader
from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost
from localglobal_jax.training import divergence, freezing
from localglobal_jax.training.setup import prepare_setup
from localglobal_jax.training.step import make_update
from localglobal_jax.training.tasks import HostBatch

log = logging.getLogger(__name__)


def replay(run: schema.Run, directory: str | pathlib.Path, step: int) -> dict[str, Any]:
    """Computes the update from `step` to ``step + 1`` again.

    Returns:
      A dict of ``step``, ``from`` (the checkpoint that it was computed from), ``finite``, ``loss``,
      ``gradient_norm``, ``parameters`` (with a gradient that is not finite), ``records`` (of the
      batch), ``inputs`` (arrays of the batch that are not finite) and ``alone``: the records that
      give a result that is not finite in a batch of that record only (None on several hosts, and
      if everything is finite).

    Raises:
      ValueError: there is no such step or run, or the run uses ``parallel.compile="pmap"``.
    """
    if not 0 <= step < run.steps:
        raise ValueError(f"--replay {step}: the run has the steps 0 to {run.steps - 1}")
    if run.parallel.compile == "pmap":
        raise ValueError(
            "--replay needs --config.parallel.compile=jit. Dropout then draws other numbers than "
            "under pmap"
        )
    setup = prepare_setup(run, directory)
    if not (setup.mirror.local / "config.json").exists():
        raise ValueError(f"--replay {step}: {directory} holds no run (it has no config.json)")
    run, partitioner, task = setup.run, setup.partitioner, setup.task
    checkpoints, restored = setup.checkpoints(), None
    for saved in sorted(saved for saved in checkpoints.steps() if saved <= step)[::-1]:
        try:
            restored = setup.restore(checkpoints, saved)
            break
        except reader.CorruptCheckpoint as error:
            log.warning("%s", error)
    start, state, _ = restored or setup.begin()
    if checkpoints.steps() and not restored:
        log.warning("no checkpoint is as old as step %d: computing from step 0", step)
    log.info("replay   steps %d to %d", start, step)

    update = make_update(task, setup.optimizer, run)
    step_fn = partitioner.compile_step(update, setup.template)
    for batch in task.train_batches(start, step):
        state, _ = step_fn(state, partitioner.train_batch(batch))
    batch = next(task.train_batches(step, step + 1))
    optim = run.optim.model_copy(update={"skip_nonfinite": 0})  # a skipped step reports zeros
    bare = make_update(task, setup.optimizer, run.model_copy(update={"optim": optim}))
    outcome_fn = partitioner.compile_eval(lambda state, batch: bare(state, batch)[1])

    def outcome_of(batch: HostBatch) -> divergence.Outcome:
        return jax.device_get(outcome_fn(state, partitioner.global_batch(batch)))

    outcome = outcome_of(batch)
    alone = None
    if not outcome.finite.all() and multihost.count() == 1:
        alone = sorted(
            int(record)
            for row, record in enumerate(batch["index"])
            if not outcome_of(_only(batch, row)).finite.all()
        )
    trained = freezing.trained(state.variables["params"], run.optim.freeze)
    _, parameters = divergence.wrong(outcome.finite, trained)
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
    """Returns a batch of the same shape in which every row is row `row`."""
    return {name: np.repeat(x[row : row + 1], len(x), axis=0) for name, x in batch.items()}
