# SPDX-License-Identifier: Apache-2.0
"""The interface between a task and the training loop: loss, data, evaluators."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from localglobal_jax.checkpoints.workdir import check_labels
from localglobal_jax.data.identity import Record
from localglobal_jax.models.registry import Variables

HostBatch = Mapping[str, np.ndarray]
Batch = Mapping[str, Array]
Sums = Mapping[str, tuple[Array, Array]]  # name -> (sum, count), mergeable over batches and hosts


class Loss(NamedTuple):
    """The loss of one batch, as sums, so that micro-batches and padding add up exactly."""

    total: Float[Array, ""]  # summed over examples; the gradient is of total / weight
    weight: Float[Array, ""]  # the number of examples or tokens with a nonzero mask
    metrics: Sums
    collections: Variables  # the model's other variables after this batch, e.g. batch_stats


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """The evaluator of one split.

    `metrics` and `predict` are pure and compiled once per shape of a batch. `size` is the number of
    examples (or tokens) of the split; evaluation fails if it counts another number.
    """

    batches: Callable[[], Iterator[HostBatch]]
    metrics: Callable[[Variables, Batch], Sums]
    metric_names: tuple[str, ...]
    size: Callable[[], int]  # called after the last batch, when bad records are known
    predict: Callable[[Variables, Batch], PyTree] | None = None  # arrays with one row per example
    # From the means and the predictions of every batch to the reported metrics.
    finish: Callable[[dict[str, float], list[PyTree]], dict[str, float]] = lambda means, _: means
    summary: str = ""  # one line: the split and its sizes


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything the loop needs of a task. All functions but the iterators of batches are pure."""

    model: nn.Module
    model_spec: Mapping[str, Any]  # arguments of `create_model` for this module
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # shapes of an example batch, to initialize the model
    loss: Callable[[Variables, Batch, jax.Array], Loss]  # of a training batch, with a random key
    train_batches: Callable[
        [int, int], Iterator[HostBatch]
    ]  # of steps start..stop, this host's shard
    evaluators: Mapping[str, Evaluator]
    items: str  # unit of the throughput: "images", "tokens"
    summary: str  # one line: the data and its sizes
    order: str  # identifies the training records (`data.identity`); with the config, the batches
    use: str  # Python for the model card: loads the model and uses it
    labels: tuple[str, ...] = ()  # names of the classes, stored in every checkpoint
    # Writes files that define the model's inputs and outputs, e.g. a vocabulary, into the workdir.
    save: Callable[[pathlib.Path], None] = lambda directory: None
    # The names of the training records, where they have names.
    records: Callable[[], Sequence[Record]] = lambda: ()

    def check_labels(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError if the checkpoint of `metadata` was trained on other classes."""
        check_labels(self.labels, metadata)
