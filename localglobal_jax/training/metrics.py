# SPDX-License-Identifier: Apache-2.0
"""Metrics as pairs ``(sum, count)``, merged over batches and hosts by addition.

An average of averages is wrong as soon as one batch is shorter. Padding has weight zero. Hits and
counts are integers, hence exact in any order.
"""

import operator
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, Shaped

from localglobal_jax.config import validation

Sums = dict[str, tuple[jax.Array, jax.Array]]
SMALLER = ("loss", "nll", "perplexity")  # metrics of which smaller values are better


USUAL = ("bleu", "accuracy", "loss")  # of an evaluation: the first that it has stands for a run


def direction(given: str) -> tuple[str, bool]:
    """Returns the name of a metric, "test/accuracy" or "-test/loss", and whether less is better.

    Less is better after a "-", and for the metrics in `SMALLER` without it.
    """
    name = given.removeprefix("-")
    return name, given.startswith("-") or name.rpartition("/")[2] in SMALLER


def check_best(best: str | None, known: Collection[str]) -> None:
    """Raises ValueError unless ``checkpoint.best`` ("test/accuracy", "-test/loss") is in `known`.

    A metric of which smaller values are better needs the "-", the others must not have it.
    """
    if not best:
        return
    name = best.removeprefix("-")
    if name not in known:
        raise validation.unknown("metric in checkpoint.best:", name, known)
    if (name.rpartition("/")[2] in SMALLER) != best.startswith("-"):
        other = name if best.startswith("-") else f"-{name}"
        raise ValueError(
            f'checkpoint.best="{best}" would keep the worst checkpoint: give "{other}"'
        )


def classification(
    logits: Float[Array, "b v"], labels: Integer[Array, " b"], mask: Shaped[Array, " b"]
) -> Sums:
    """Returns loss (nats), top-1 and, above five classes, top-5 accuracy of a padded batch.

    ``mask`` is nonzero for real examples; logits and labels of other rows (NaN, -1) have no effect.
    Between equal logits the smaller class number wins.
    """
    logits, mask = logits.astype(jnp.float32), mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    count = jnp.sum(mask, dtype=jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (top == labels[:, None]) & mask[:, None]
    sums = {
        "loss": (jnp.sum(jnp.where(mask, loss, 0)), count),
        "accuracy": (jnp.sum(hits[:, 0], dtype=jnp.int32), count),
    }
    if logits.shape[-1] > 5:
        sums["top5"] = (jnp.sum(hits, dtype=jnp.int32), count)
    return sums


def recalls(
    logits: Float[Array, "b v"], labels: Integer[Array, " b"], mask: Shaped[Array, " b"]
) -> tuple[Integer[Array, " v"], Integer[Array, " v"]]:
    """Returns hits and images of every class; `compute` makes the mean recall of them."""
    classes = jnp.arange(logits.shape[-1])[None]
    mine = (labels[:, None] == classes) & mask.astype(bool)[:, None]
    right = (logits.argmax(-1) == labels)[:, None]
    return jnp.sum(mine & right, 0, dtype=jnp.int32), jnp.sum(mine, 0, dtype=jnp.int32)


def tokens(
    logits: Float[Array, "b l v"], targets: Integer[Array, "b l"], mask: Shaped[Array, "b l"]
) -> Sums:
    """Returns cross-entropy ("nll", nats) and accuracy per token where ``mask`` is nonzero."""
    mask = mask.astype(bool)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    hits = (logits.argmax(-1) == targets) & mask
    count = jnp.sum(mask, dtype=jnp.int32)
    return {
        "nll": (jnp.sum(jnp.where(mask, loss, 0)), count),
        "accuracy": (jnp.sum(hits, dtype=jnp.int32), count),
    }


def merge(a: Sums, b: Sums) -> Sums:
    """Adds two sets of sums. Raises ValueError if they do not hold the same metrics."""
    if a.keys() != b.keys():
        raise ValueError(
            f"cannot merge metrics {sorted(a)} with {sorted(b)}: every batch must report the same"
        )
    return jax.tree.map(operator.add, a, b)


def compute(sums: Mapping[str, tuple]) -> dict[str, float]:
    """Returns sum / count as floats (NaN where the count is 0), and ``count``, an int.

    Of a metric per class the mean over the classes that occur.
    """
    result = {}
    for name, (total, count) in sums.items():
        if np.ndim(count):
            there = np.asarray(count) > 0
            each = np.asarray(total, np.float64)[there] / np.asarray(count)[there]
            result[name] = float(each.mean()) if len(each) else float("nan")
        else:
            result[name] = float(total) / float(count) if count > 0 else float("nan")
    return result | {"count": max((int(np.sum(count)) for _, count in sums.values()), default=0)}
