# SPDX-License-Identifier: Apache-2.0
"""A task says what a batch means: its loss, its data, its evaluators. The loop knows no more."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from localglobal_jax.checkpoints.workdir import check_labels
from localglobal_jax.models.registry import Variables

HostBatch = Mapping[str, np.ndarray]
Batch = Mapping[str, Array]
Sums = Mapping[str, tuple[Array, Array]]  # name -> (sum, count), mergeable over batches and hosts


class Loss(NamedTuple):
    """What one batch says. Sums, not means, so that micro-batches and padding add up exactly."""

    total: Float[Array, ""]  # summed over examples; the gradient is that of total / weight
    weight: Float[Array, ""]  # examples (or tokens) that count
    metrics: Sums
    collections: Variables  # the model's other variables after this batch, e.g. batch_stats


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One split to evaluate.

    `metrics` and `predict` are pure and compiled once per shape of a batch. `size` is the number of
    examples (or tokens) that the result must be made of; evaluation fails if it is not.
    """

    batches: Callable[[], Iterator[HostBatch]]
    metrics: Callable[[Variables, Batch], Sums]
    metric_names: tuple[str, ...]
    size: Callable[[], int]  # asked after the last batch, when the bad records are known
    predict: Callable[[Variables, Batch], PyTree] | None = None  # arrays for the host, row by row
    # From the means and what was predicted for every batch, what is reported.
    finish: Callable[[dict[str, float], list[PyTree]], dict[str, float]] = lambda means, _: means


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything the loop needs. Functions are pure but for the batches they yield."""

    model: nn.Module
    model_spec: Mapping[str, Any]  # what `create_model` needs to build the same module again
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # of one example batch, to initialise the model
    loss: Callable[[Variables, Batch, jax.Array], Loss]  # training mode, with a random key
    train_batches: Callable[[int, int], Iterator[HostBatch]]  # of steps start..stop, this host's
    evaluators: Mapping[str, Evaluator]
    items: str  # what is counted per second: "images", "tokens"
    summary: str  # one line for people: the data and its sizes
    order: str  # what the training batches hang on beside the config: the records that are used
    use: str  # Python for the model card: the trained model from its directory, and what it does
    labels: tuple[str, ...] = ()  # what the numbers of classes mean; kept in every checkpoint
    # Writes what the model's inputs and outputs mean, e.g. a vocabulary, into the workdir.
    save: Callable[[pathlib.Path], None] = lambda directory: None

    def check_labels(self, metadata: Mapping[str, Any]) -> None:
        """See the function."""
        check_labels(self.labels, metadata)
