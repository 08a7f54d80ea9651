# SPDX-License-Identifier: Apache-2.0
"""Tasks: where models meet data. One file each; `task.py` says what a task is."""

import pathlib
from collections.abc import Callable

from localglobal_jax.config import schema
from localglobal_jax.training.tasks import classification, translation
from localglobal_jax.training.tasks.task import (
    Batch,
    Evaluator,
    HostBatch,
    Loss,
    Sums,
    Task,
    Variables,
)

TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification.create,
    "translation": translation.create,
}

__all__ = [
    "TASKS",
    "Batch",
    "Evaluator",
    "HostBatch",
    "Loss",
    "Sums",
    "Task",
    "Variables",
    "create_task",
]


def create_task(
    run: schema.Run,
    *,
    shard: tuple[int, int] = (0, 1),
    train: bool = True,
    workdir: pathlib.Path | None = None,
) -> Task:
    """The task that `run` describes, as host `shard[0]` of `shard[1]` sees it.

    `train`: whether it will train; if not, the training data need not be there. `workdir`: of the
    run; what `Task.save` has written there is read.
    """
    return TASKS[run.task.name](run, shard=shard, train=train, workdir=workdir)
