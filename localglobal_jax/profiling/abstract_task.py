# SPDX-License-Identifier: Apache-2.0
"""Builds the task of a run from shapes alone: so that planning reads no data."""

import pathlib
import tempfile

import jax
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data.images import label_maps
from localglobal_jax.data.text import bucketing, tokenizers
from localglobal_jax.training.tasks import Task, create_task

Shapes = dict[str, jax.ShapeDtypeStruct]


def create(run: schema.Run) -> Task:
    """Returns the task of `run` with mock data: same model, classes, vocabulary; reads nothing.

    Classes are those that TFDS declares for the data set, the vocabulary is ``data.vocab`` (or
    that of the run's dictionaries, or of the run in ``init``).
    """
    given = {"mock": True}
    if isinstance(run.data, schema.Images):
        given["in_memory"] = False
    mock = run.model_copy(update={"data": run.data.model_copy(update=given)})
    if not isinstance(run.data, schema.Text) or not run.data.dicts:
        return create_task(mock)
    words = tokenizers.of_dictionaries(run.data.dicts)
    with tempfile.TemporaryDirectory() as directory:
        tokenizers.save(words, pathlib.Path(directory) / tokenizers.DIRECTORY)
        return create_task(mock, workdir=pathlib.Path(directory))


def batch(run: schema.Run, task: Task, *, train: bool) -> tuple[Shapes, str]:
    """Returns the shapes of a global batch, and a line that describes it.

    Text has one shape per bucket. The longest bucket, ``data.max_length``, is used, in evaluation
    too: it holds as many tokens as any other and needs the most attention.
    """
    options = run.data
    if isinstance(options, schema.Images):
        rows = run.batch_size if train else run.eval_rows[1]
        size = task.inputs[0].shape[1:]
        shapes = {
            "image": jax.ShapeDtypeStruct((rows, *size), np.uint8),
            "label": jax.ShapeDtypeStruct((rows,), np.int32),
            "mask": jax.ShapeDtypeStruct((rows,), np.float32),
            "index": jax.ShapeDtypeStruct((rows,), np.int32),
        }
        if train and options.label_maps:
            maps = (rows, *label_maps.PUBLISHED)
            shapes["label_map"] = jax.ShapeDtypeStruct(maps, label_maps.dtype(task.model.classes))
            shapes["label_box"] = jax.ShapeDtypeStruct((rows, 5), np.float32)
        return shapes, f"{rows} images of {'x'.join(map(str, size))}"
    tokens = run.batch_size if train else run.eval.batch_size or run.batch_size
    edge = int(bucketing.round_up(np.array([options.max_length]))[0])
    if train:
        bucketing.check_budget((edge,), tokens, options.rows_multiple)
    (rows,) = bucketing.rows_of((edge,), tokens, options.rows_multiple)
    text = jax.ShapeDtypeStruct((rows, edge), np.int32)
    shapes = {
        "source": text,
        "target_input": text,
        "target": text,
        "mask": jax.ShapeDtypeStruct(text.shape, np.float32),
        "index": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    return shapes, f"{rows} pairs padded to {edge} tokens (the longest bucket) = {rows * edge}"


def items(shapes: Shapes) -> int:
    """Returns the items of one step: images, or target tokens with their padding."""
    return int(np.prod((shapes.get("target") or shapes["label"]).shape))
