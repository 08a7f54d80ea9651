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
from localglobal_jax.convert import files
from localglobal_jax.models import flops
from localglobal_jax.parallel import host_memory, multihost
from localglobal_jax.parallel import placement as parallel
from localglobal_jax.training import optim
from localglobal_jax.training.reporting import wandb
from localglobal_jax.training.step import State, check_batches, init_state, start_from
from localglobal_jax.training.tasks import HostBatch, Task, Variables, create_task


class Session(NamedTuple):
    """What a run is made of."""

    copy: gcs.Copy  # of the workdir
    placement: parallel.Placement
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


def open_session(run: schema.Run, directory: str | pathlib.Path) -> Session:
    """Raises ValueError, before anything on disk is touched, if the run cannot be right."""
    wandb.check(run.log.wandb)
    copy = gcs.Copy(directory)
    placement = parallel.Placement(run.parallel)
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
    pretrained = files.pretrained(run.init, task.model, task.inputs) if run.init else None
    return Session(copy, placement, task, optimizer, init, template, pretrained)


def batch_bytes(run: schema.Run) -> int:
    """Of the larger of the global batches as the host holds them, at the very least."""
    largest = max(run.batch_size, run.eval.batch_size or 0)
    if isinstance(run.data, schema.Text):
        return 16 * largest  # source, what the decoder reads, target, mask
    return largest * math.prod(run.data.image_size)
