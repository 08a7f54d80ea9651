# SPDX-License-Identifier: Apache-2.0
"""Tasks connect models with data: one file each, and `create_task`, which makes one of a run."""

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
    parts: int | None = None,
    train: bool = True,
    workdir: pathlib.Path | None = None,
) -> Task:
    """Creates the task of `run`, with the data of host `shard[0]` of `shard[1]`.

    Args:
      parts: number of devices that split a batch, which its rows are a multiple of; None: not
        known, and then the rows of text are a multiple of ``data.rows_multiple``.
      train: whether the task will train; else the training data is not opened.
      workdir: the workdir of the run, from which files written by `Task.save` are read.
    """
    return TASKS[run.task.name](run, shard=shard, parts=parts, train=train, workdir=workdir)
