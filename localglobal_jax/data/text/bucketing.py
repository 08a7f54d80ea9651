# SPDX-License-Identifier: Apache-2.0
"""Buckets of similar lengths, and the sentences of batch number n. Pure arithmetic.

A batch has one of a few static shapes, ``rows x length``, so that each is compiled once. Every
bucket is an endless stream: its sentences in one random order after the other, cut into batches
that may straddle epochs, so that no batch is short and none repeats or skips a sentence. An epoch's
batches are those that are full by its end, in random order. All of it is a function of
(seed, n): nothing is remembered, so resuming is starting at n.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRANULE = 8  # lengths are multiples of it, as accelerators like them
# Attention's memory, rows * length**2, of an evaluation batch over that of the largest training
# batch. Training also keeps the activations of every layer for the gradient.
ATTENTION = 4


def round_up(lengths: np.ndarray) -> np.ndarray:
    """Returns each length rounded up to a multiple of `GRANULE`."""
    return -(-lengths // GRANULE) * GRANULE


def make_edges(lengths: np.ndarray, count: int) -> tuple[int, ...]:
    """Returns the ``count`` bucket lengths (fewer where all are met) that need least padding.

    ``lengths: int [n]``, n > 0. The last edge holds the longest. Exact, by dynamic programming
    over the distinct rounded lengths g_0 < g_1 < ...: the cheapest way to cover the first j of
    them with k edges puts the last edge at g_j and begins its bucket after some i < j.
    """
    sizes, numbers = np.unique(round_up(lengths), return_counts=True)
    below = np.concatenate([[0], np.cumsum(numbers)])  # sentences up to the i-th length
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)  # with no edge at all
    choices = []
    for _ in range(min(count, len(sizes))):
        best, start = np.full(len(cost), np.inf), np.zeros(len(cost), int)
        best[0] = 0.0  # an edge may stay unused
        for j in range(1, len(cost)):
            options = cost[:j] + (below[j] - below[:j]) * float(sizes[j - 1])
            start[j] = int(np.argmin(options))
            best[j] = options[start[j]]
        cost = best
        choices.append(start)
    edges, j = [], len(sizes)
    for start in reversed(choices):
        if j == 0:
            break
        edges.append(int(sizes[j - 1]))
        j = int(start[j])
    return tuple(reversed(edges))


def rows_of(edges: Sequence[int], tokens: int, multiple: int) -> tuple[int, ...]:
    """Returns the rows of a batch of each length: as many as ``tokens`` padded tokens allow.

    A multiple of ``multiple``, and never less, even where that takes more tokens.
    """
    return tuple(max(1, tokens // edge // multiple) * multiple for edge in edges)


class Budget(NamedTuple):
    """Bound of the memory of an evaluation batch: the one of training, for pairs of any length.

    A batch has at most ``tokens`` padded tokens. Attention of a sentence grows with the square of
    its length, so batches of pairs longer than ``max_length`` have still fewer rows.
    """

    tokens: int
    multiple: int  # rows are a multiple of it ...
    parts: int | None = None  # ... or of the devices that split a batch, where these are too many
    max_length: int | None = None  # tokens, of training pairs; None: attention is not bounded

    def rows(self, edge: int) -> int:
        """Returns the rows of a batch of length ``edge``; at least one per device."""
        least, most = self.parts or self.multiple, self.tokens // edge
        if self.max_length and edge > self.max_length:
            most = min(most, ATTENTION * self.tokens * self.max_length // edge**2)
        unit = self.multiple if most >= self.multiple else least
        return max(least, most // unit * unit)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest pairs that are evaluated; None: all are.

        At least `max_length`: a training batch holds such pairs in as many rows.
        """
        if not self.max_length:
            return None
        per_device = self.tokens // (self.parts or self.multiple)
        bound = min(per_device, math.isqrt(ATTENTION * per_device * self.max_length))
        return max(self.max_length, bound // GRANULE * GRANULE)

    def tokens_for(self, length: int) -> int:
        """Returns the smallest `tokens` with which pairs of ``length`` tokens are evaluated."""
        assert self.max_length, "without it, all pairs are evaluated"
        edge = -(-length // GRANULE) * GRANULE
        per_device = max(edge, -(-edge * edge // (ATTENTION * self.max_length)))
        return (self.parts or self.multiple) * per_device


def check_budget(edges: Sequence[int], tokens: int, multiple: int) -> None:
    """Raises ValueError if ``multiple`` of the longest sentences are more than ``tokens``."""
    if (needed := multiple * edges[-1]) > tokens:
        raise ValueError(
            f"batch_size={tokens} tokens cannot hold data.rows_multiple={multiple} sentences "
            f"padded to {edges[-1]} tokens: take at least {needed}, or a smaller data.max_length"
        )


def shuffled(size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """Returns a permutation ``int32 [size]``, a pure function (Philox, then a sort)."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    philox = np.random.Philox(
        key=np.array([key, stream], np.uint64), counter=np.array([0, epoch, 0, 0], np.uint64)
    )
    return np.argsort(philox.random_raw(size), kind="stable").astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The schedule of training batches: the bucket and the sentences of batch n."""

    members: tuple[np.ndarray, ...]  # of each bucket: the numbers of its sentences
    rows: tuple[int, ...]  # of each bucket: sentences in a batch
    seed: int

    def batch(self, n: int) -> tuple[int, np.ndarray]:
        """Returns ``(bucket, sentence numbers [rows])`` of batch ``n``."""
        epoch = self._epoch(n)
        before = [self._done(bucket, epoch) for bucket in range(len(self.rows))]
        after = [self._done(bucket, epoch + 1) for bucket in range(len(self.rows))]
        ends = np.cumsum(np.subtract(after, before))
        slot = int(self._order(len(self.rows), epoch, int(ends[-1]))[n - sum(before)])
        bucket = int(np.searchsorted(ends, slot, "right"))
        number = after[bucket] - int(ends[bucket]) + slot  # batches of this bucket before it
        return bucket, self._sentences(bucket, number)

    def epoch(self, n: int) -> float:
        """Returns the number of epochs completed before batch ``n``."""
        return n / sum(len(m) / r for m, r in zip(self.members, self.rows, strict=True))

    def _done(self, bucket: int, epochs: int) -> int:
        """Returns the number of a bucket's full batches after so many epochs."""
        return epochs * len(self.members[bucket]) // self.rows[bucket]

    def _epoch(self, n: int) -> int:
        def done(epochs: int) -> int:
            return sum(self._done(bucket, epochs) for bucket in range(len(self.rows)))

        beyond = int(self.epoch(n + len(self.rows))) + 3  # each bucket lags by less than a batch
        return bisect.bisect_right(range(beyond), n, key=done) - 1

    def _sentences(self, bucket: int, number: int) -> np.ndarray:
        members, rows = self.members[bucket], self.rows[bucket]
        position = np.arange(number * rows, (number + 1) * rows)
        chosen = np.empty(rows, np.int32)
        for epoch in np.unique(position // len(members)).tolist():
            here = position // len(members) == epoch
            order = self._order(bucket, epoch, len(members))
            chosen[here] = members[order[position[here] % len(members)]]
        return chosen

    def _order(self, stream: int, epoch: int, size: int) -> np.ndarray:
        return _remembered(size, self.seed, stream, epoch)


# A few epochs of a few buckets; a pure function, so sharing it between threads is safe.
_remembered = functools.lru_cache(maxsize=32)(shuffled)
