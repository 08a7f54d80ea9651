# SPDX-License-Identifier: Apache-2.0
"""A run before its first step: everything that can refuse has been asked, nothing is written."""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from localglobal_jax.checkpoints import gcs, workdir
from localglobal_jax.checkpoints.manager import Checkpoints, Restored
from localglobal_jax.config import schema
from localglobal_jax.inference import load
from localglobal_jax.models import flops
from localglobal_jax.parallel import host_memory, multihost
from localglobal_jax.parallel import placement as parallel
from localglobal_jax.training import optim
from localglobal_jax.training.reporting import wandb
from localglobal_jax.training.step import State, check_batches, init_state, start_from
from localglobal_jax.training.tasks import HostBatch, Task, Variables, create_task


class TrainSetup(NamedTuple):
    """What a run is made of."""

    copy: gcs.LocalMirror  # of the workdir
    placement: parallel.Partitioner
    task: Task
    optimizer: optax.GradientTransformation
    init: Callable[[], State]  # compiled
    template: State  # shapes and shardings
    pretrained: Variables | None  # to start from, if the run fine-tunes

    def checkpoints(self, run: schema.Run) -> Checkpoints:
        """Those of the workdir."""
        return Checkpoints(self.copy.checkpoints, run.checkpoint)

    def restore(self, checkpoints: Checkpoints, step: int | None = None) -> Restored | None:
        """The newest good checkpoint, or the given one; None if there is none at all.

        Raises ValueError if the data is not what it was: another batch would be number n.
        """
        restored = checkpoints.restore(self.template, step)
        was = restored.metadata.get("order", self.task.order) if restored else self.task.order
        if restored:
            self.task.check_labels(restored.metadata)
        if restored and was != self.task.order:
            raise ValueError(
                f"the training data is not what it was at step {restored.step}: {was} then, "
                f"{self.task.order} now, so batches would be others. Have the data as it was, or "
                "give another --workdir"
            )
        return restored

    def begin(self) -> Restored:
        """The state of step 0."""
        state = self.init()
        if self.pretrained:
            state = start_from(state, self.placement.put(self.pretrained))
        return Restored(0, state, {})

    def work_of(self, update: Callable[..., Any]) -> Callable[[HostBatch], int]:
        """Multiply-adds of one step of all hosts, by this host's batch; counted from shapes."""

        def work(batch: HostBatch) -> int:
            parts = self.placement.shard[1]
            whole = {
                name: jax.ShapeDtypeStruct((parts * len(x), *x.shape[1:]), x.dtype)
                for name, x in batch.items()
            }
            return flops.multiply_adds(update, self.template, whole)

        return work


def prepare_setup(run: schema.Run, directory: str | pathlib.Path) -> TrainSetup:
    """Raises ValueError, before anything on disk is touched, if the run cannot be right."""
    wandb.check(run.log.wandb)
    copy = gcs.LocalMirror(directory)
    placement = parallel.Partitioner(run.parallel)
    check_batches(run, placement)
    parts = placement.shard[1]
    host_memory.check(
        f"batch_size={run.batch_size}", batch_bytes(run) // parts, "Take a smaller one."
    )
    workdir.refuse_other(run, copy.local)
    task = create_task(run, shard=placement.shard, workdir=copy.local)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    init = placement.compile_init(lambda: init_state(task, optimizer, run))
    template = placement.template(jax.eval_shape(init))
    if jax.default_backend() == "cpu":  # an accelerator has memory of its own
        what = "the parameters of config.model and the optimizer's state"
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))
        host_memory.check(what, size // multihost.count(), "Take a smaller model.")
    pretrained = load.pretrained(run.init, task.model, task.inputs) if run.init else None
    return TrainSetup(copy, placement, task, optimizer, init, template, pretrained)


def batch_bytes(run: schema.Run) -> int:
    """Of the larger of the global batches as the host holds them, at the very least."""
    largest = max(run.batch_size, run.eval.batch_size or 0)
    if isinstance(run.data, schema.Text):
        return 16 * largest  # source, what the decoder reads, target, mask
    return largest * math.prod(run.data.image_size)


def reserve(run: schema.Run, task: Task, copy: gcs.LocalMirror, lock: workdir.Lock) -> None:
    """Makes the workdir this run's, once every host has found nothing wrong."""
    multihost.barrier("checked")
    if multihost.rank() == 0:
        try:
            lock.take(copy.lock)
            workdir.refuse_other(run, copy.local)  # again: another one may have come first
            workdir.reserve(run, copy.local)
            task.save(copy.local)
            copy.push()
        except (ValueError, OSError) as error:
            multihost.broadcast_text("claimed", f"{isinstance(error, ValueError):d}{error}")
            raise
    if refused := multihost.broadcast_text("claimed", ""):  # every host ends for the same reason
        raise (ValueError if refused[0] == "1" else OSError)(refused[1:])
    if multihost.rank():
        copy.pull()
    workdir.check_shared(copy.local)
