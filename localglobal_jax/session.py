# SPDX-License-Identifier: Apache-2.0
"""A run before its first step: everything that can refuse has been asked, nothing is written."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from localglobal_jax import conversion, optim, parallel, remote, schema, workdir
from localglobal_jax.checkpoint import Checkpoints, Restored
from localglobal_jax.tasks import Task, Variables, create_task
from localglobal_jax.train_step import State, check_batches, init_state, start_from


class Session(NamedTuple):
    """What a run is made of."""

    copy: remote.Copy  # of the workdir
    placement: parallel.Placement
    task: Task
    optimizer: optax.GradientTransformation
    init: Callable[[], State]  # compiled
    template: State  # shapes and shardings
    pretrained: Variables | None  # to start from, if the run fine-tunes

    def checkpoints(self, run: schema.Run) -> Checkpoints:
        """Those of the workdir."""
        return Checkpoints(self.copy.checkpoints, run.checkpoint)

    def begin(self) -> Restored:
        """The state of step 0."""
        state = self.init()
        if self.pretrained:
            state = start_from(state, self.placement.put(self.pretrained))
        return Restored(0, state, {})


def open_session(run: schema.Run, directory: str | pathlib.Path) -> Session:
    """Raises ValueError, before anything on disk is touched, if the run cannot be right."""
    copy = remote.Copy(directory)
    placement = parallel.Placement(run.parallel)
    check_batches(run, placement)
    workdir.refuse_other(run, copy.local)
    task = create_task(run, shard=placement.shard, workdir=copy.local)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    init = placement.compile_init(lambda: init_state(task, optimizer, run))
    template = placement.template(jax.eval_shape(init))
    pretrained = conversion.pretrained(run.init, task.model, task.inputs) if run.init else None
    return Session(copy, placement, task, optimizer, init, template, pretrained)
