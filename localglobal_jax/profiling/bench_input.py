# SPDX-License-Identifier: Apache-2.0
"""Measures the input of a training run alone: no model, no accelerator, no jax.

Items are counted while batches are taken as fast as they come. One batch is then made step by step
in one thread. Where all cores together should be much faster than what was counted, the rest is
waiting: for the interpreter's lock, for the handover from other processes, or for other programs.
"""

import os
import pickle  # nosec B403, within this process
import time
from collections.abc import Callable, Iterator
from typing import Any

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import folder
from localglobal_jax.data.images import pipeline as images
from localglobal_jax.data.text import pipeline as text
from localglobal_jax.data.tfds import gcs, records

WAITING = "Python's lock, handing over batches or other programs"
GOOD = 0.7  # share of the rate that the cores allow, below which waiting is the bottleneck
SAMPLE = 64  # images that are made step by step


def refuse_upload(run: schema.Run) -> None:
    """Raises ValueError for a TFDS set in a bucket that is not prepared: a measurement writes none.

    On disk, opening an embedded set prepares it, and logs that.
    """
    data = run.data
    if data.mock or data.name == folder.NAME or getattr(data, "files", None):
        return
    root = records.data_root(data.dir)
    if gcs.is_bucket(root) and not records.is_prepared(
        builder := records.find_builder(data.name, root)
    ):
        raise ValueError(records.missing(builder))


def measure(run: schema.Run, steps: int) -> dict[str, Any]:
    """Returns the report of `steps` training batches of this host, after a first one.

    Raises ValueError for data that cannot be opened, or fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"--steps {steps}: a rate needs at least 2")
    refuse_upload(run)
    source, batches, stages = _opened(run, steps + 1)
    began = time.perf_counter()
    with_first = next(batches)
    start = time.perf_counter() - began
    items = size = 0.0
    began = time.perf_counter()
    for batch in batches:
        items += float(batch["mask"].sum())
        size += sum(array.nbytes for array in batch.values())
    seconds = time.perf_counter() - began
    found, read = stages(source, with_first)
    units = min(os.cpu_count() or 1, (run.data.workers or 1) * run.data.threads)
    share = items / seconds * sum(found.values()) / units
    return {
        "items": "images" if isinstance(run.data, schema.Images) else "target tokens",
        "threads": run.data.threads,
        "workers": run.data.workers,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "first_batch_seconds": start,
        "items_per_second": items / seconds,
        "mb_per_second": size / seconds / 1e6,
        "read_mb_per_second": read * items / seconds / 1e6,
        "us_per_item": {name: 1e6 * value for name, value in found.items()},
        # nothing is read for a batch: the rate is not that of the disk or of the bucket
        "in_memory": not read,
        "share_of_cores": share,
        "bottleneck": max(found, key=lambda name: found[name]) if share > GOOD else WAITING,
    }


def _opened(run: schema.Run, stop: int) -> tuple[Any, Iterator[loader.Batch], Callable[..., Any]]:
    """Returns the source, its batches, and the function that measures its stages."""
    common: dict[str, Any] = {"seed": run.seed, "start": 0, "stop": stop}
    common["workers"] = run.data.workers
    if isinstance(run.data, schema.Images):
        source = images.open_split(run.data, run.data.train_split, train=True)
        return (
            source,
            loader.train_batches(source, batch_size=run.batch_size, **common),
            _image_stages,
        )
    sentences = text.open_train(run.data)
    common |= {"tokens": run.batch_size, "multiple": run.data.rows_multiple}
    return (
        sentences,
        text.train_batches(sentences, threads=run.data.threads, **common),
        _text_stages,
    )


def _image_stages(
    source: images.ImageSource, batch: loader.Batch
) -> tuple[dict[str, float], float]:
    """Returns seconds an image takes of one thread, by stage, and its bytes before decoding."""
    index = batch["index"][:SAMPLE]
    alone = pickle.loads(pickle.dumps(source))  # nosec B301, of this process
    alone.use_threads(1)
    seconds, size = alone.timed(index, loader.PositionRng(0, 0))
    return {name: value / len(index) for name, value in seconds.items()}, size / len(index)


def _text_stages(source: text.TextSource, batch: loader.Batch) -> tuple[dict[str, float], float]:
    """Returns seconds a target token takes of one thread, and 0: text is in memory."""
    began = time.perf_counter()
    made = source.batch(batch["index"], batch["target"].shape[1])
    return {"padding": (time.perf_counter() - began) / float(made["mask"].sum())}, 0.0
