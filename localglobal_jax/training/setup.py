# SPDX-License-Identifier: Apache-2.0
"""Builds and validates everything a run needs, before anything is written."""

import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from localglobal_jax.checkpoints import gcs, steps, store, workdir
from localglobal_jax.checkpoints.manager import Checkpoints, Restored
from localglobal_jax.config import schema
from localglobal_jax.data import identity
from localglobal_jax.data.images import folder
from localglobal_jax.inference import load
from localglobal_jax.models import flops
from localglobal_jax.parallel import host_memory, multihost
from localglobal_jax.parallel.placement import Partitioner
from localglobal_jax.training import optim
from localglobal_jax.training.reporting import wandb
from localglobal_jax.training.step import State, check_batches, init_state, start_from
from localglobal_jax.training.tasks import HostBatch, Task, Variables, create_task

log = logging.getLogger(__name__)


class TrainSetup(NamedTuple):
    """The parts of a run: workdir, devices, task, optimizer, and how its state is made."""

    run: schema.Run  # as it began, see `checkpoints.workdir.as_begun`
    mirror: gcs.LocalMirror  # the workdir
    partitioner: Partitioner
    task: Task
    optimizer: optax.GradientTransformation
    init: Callable[[], State]  # compiled
    template: State  # shapes and shardings
    pretrained: Callable[[], Variables] | None  # initial variables of a fine-tuning run
    accept_changes: bool = False  # of the training records

    def checkpoints(self) -> Checkpoints:
        """Returns the checkpoints of the workdir."""
        return Checkpoints(self.mirror.checkpoints, self.run.checkpoint)

    def restore(self, checkpoints: Checkpoints, step: int | None = None) -> Restored | None:
        """Restores the newest valid checkpoint, or the given one; None if there is none.

        Raises ValueError if the training records have changed, as batch n would be another one,
        unless `accept_changes`.
        """
        restored = checkpoints.restore(self.template, step)
        if restored is None:
            return None
        self.task.check_labels(restored.metadata)
        was, now = restored.metadata.get("order", self.task.order), self.task.order
        if identity.same(was, now):
            return restored
        found = identity.changes(self.mirror.local, was, self.task.records())
        changed = f"the training data has changed since step {restored.step}: {was} then, {now} now"
        changed += f" ({found})" * bool(found)
        if not self.accept_changes:
            raise ValueError(
                f"{changed}, so the batches would differ. Restore the data, give another --workdir "
                "(with --config.init of this one it starts from its weights), or go on with the "
                "data as it is: --config.data.accept_changes=True"
            )
        log.warning("%s; going on, as data.accept_changes says", changed)
        return restored

    def note_records(self) -> None:
        """Writes the names of the training records to the workdir, so that a change is named."""
        if multihost.rank() == 0 and (found := self.task.records()):
            identity.write(self.mirror.local, self.task.order, found)

    def begin(self) -> Restored:
        """Returns the initial state, with the pretrained variables if there are any."""
        state = self.init()
        if self.pretrained:
            state = start_from(state, self.partitioner.put(self.pretrained()))
        return Restored(0, state, {})

    def work_of(self, update: Callable[..., Any]) -> Callable[[HostBatch], int]:
        """Returns the function from this host's batch to the multiply-adds of the global step."""

        def work(batch: HostBatch) -> int:
            parts = self.partitioner.shard[1]
            whole = {
                name: jax.ShapeDtypeStruct((parts * len(x), *x.shape[1:]), x.dtype)
                for name, x in batch.items()
            }
            return flops.multiply_adds(update, self.template, whole)

        return work


def prepare_setup(run: schema.Run, directory: str | pathlib.Path) -> TrainSetup:
    """Builds the parts of `run`; writes nothing. Raises ValueError if the run is not valid."""
    wandb.check(run.log.wandb)
    mirror = gcs.LocalMirror(directory)
    run = workdir.as_begun(run, mirror.local)
    partitioner = Partitioner(run.parallel)
    check_batches(run, partitioner)
    parts = partitioner.shard[1]
    host_memory.check(
        f"batch_size={run.batch_size}", batch_bytes(run) // parts, "Take a smaller one."
    )
    workdir.refuse_other(run, mirror.local)
    with folder.listed_once():
        if isinstance(run.data, schema.Images):
            folder.check_workdir(run.data, directory)
        task = create_task(
            run, shard=partitioner.shard, parts=partitioner.batch_parts, workdir=mirror.local
        )
    optimizer = optim.make_optimizer(run.optim, run.steps)
    init = partitioner.compile_init(lambda: init_state(task, optimizer, run))
    template = partitioner.template(jax.eval_shape(init))
    if run.optim.layer_decay < 1:
        optim.layer_numbers(template.variables["params"])
    if jax.default_backend() == "cpu":  # elsewhere the state is in device memory
        name = "the parameters of config.model and the optimizer's state"
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))
        host_memory.check(name, size // multihost.count(), "Take a smaller model.")
    pretrained = None
    if run.init:
        fit = (task.model, task.inputs, task.labels, run.data)
        pretrained = functools.cache(functools.partial(load.pretrained, run.init, *fit))
        if not any(steps.scan(mirror.checkpoints).values()):  # else it may be gone
            pretrained()
    accept = run.data.accept_changes
    return TrainSetup(run, mirror, partitioner, task, optimizer, init, template, pretrained, accept)


def batch_bytes(run: schema.Run) -> int:
    """Returns a lower bound of the bytes of the larger global batch (training or evaluation)."""
    largest = max(run.batch_size, run.eval.batch_size or 0)
    if isinstance(run.data, schema.Text):
        return 16 * largest  # source, decoder input, target and mask, int32 or float32
    return largest * math.prod(run.data.image_size)


def _check_same_records(task: Task) -> None:
    """Raises ValueError, on every host, if the hosts have other training records or classes."""
    own = json.dumps([task.order, f"{len(task.labels)} classes {identity.digest(task.labels)}"])
    (order, labels), *others = map(json.loads, multihost.all_texts("records", own))
    for number, (theirs, names) in enumerate(others, 1):
        if names != labels or not identity.same(order, theirs):
            raise ValueError(
                f"the training data of the hosts differ: {order}, {labels} on host 0, {theirs}, "
                f"{names} on host {number}. Each host reads a part of every batch: give all the "
                "same data"
            )


def reserve(run: schema.Run, task: Task, mirror: gcs.LocalMirror, lock: workdir.Lock) -> None:
    """Locks the workdir and writes the config, once the setup has succeeded on every host.

    An error on host 0 is raised on every host.
    """
    multihost.barrier("checked")
    _check_same_records(task)
    if multihost.rank() == 0:
        try:
            lock.take(mirror.lock, run=f"{run.model['name']} on {run.data.name}, seed {run.seed}")
            mirror.confirm = lock.confirm
            # Again: another run may have started meanwhile, or have ended with more lines.
            mirror.pull()
            workdir.refuse_other(run, mirror.local)
            workdir.reserve(run, mirror.local)
            task.save(mirror.local)
            mirror.push()
        except (ValueError, OSError) as error:
            final = isinstance(error, store.StoreFailed) and error.is_final
            wrong = final or isinstance(error, ValueError)
            multihost.broadcast_text("reserved", f"{wrong:d}{error}")
            if final:  # no permission to write
                raise ValueError(str(error)) from error
            raise
    if failed := multihost.broadcast_text("reserved", ""):
        raise (ValueError if failed[0] == "1" else OSError)(failed[1:])
    if multihost.rank():
        mirror.pull()  # what host 0 has written
    workdir.check_shared(mirror.local)
