# SPDX-License-Identifier: Apache-2.0
"""Sentence pairs as batches of token ids of a few static shapes, addressed by number.

The door is `open_train`, then `open_eval` for each split beside it. A batch holds

- ``source [b, l]``: the sentence and EOS;
- ``target_input [b, l]``: EOS and the translation, as fairseq starts its decoder;
- ``target [b, l]``: the translation and EOS, what the model has to say at each place;
- ``mask [b, l]`` float32: 1 where ``target`` counts;
- ``index [b]``: the numbers of the pairs among those of the split that are used.

All but the mask are int32, padded at the right by PAD. ``l`` is the length of a bucket and
``b * l`` at most the token budget.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.text import bucketing, pairs
from localglobal_jax.data.text.tokenizers import (
    EOS,
    PAD,
    UNK,
    Dictionary,
    Tokenizer,
    Tokenizers,
    create,
)

Batch = loader.Batch

BLOCK = 65_536  # sentences tokenised at a time


class Ragged:
    """Sequences of ids end to end: ``flat int32 [total]``, ``lengths int64 [n]``.

    Lists of Python integers would take ten times the memory: a corpus of millions would not fit.
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray):
        self.flat, self.lengths = flat, lengths
        self._starts = np.cumsum(lengths) - lengths

    @classmethod
    def encode(cls, tokenizer: Tokenizer, texts: Sequence[str]) -> "Ragged":
        """Returns the ids of ``texts``, without special ids."""
        flat, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for start in range(0, len(texts), BLOCK):
            ids = tokenizer.encode(texts[start : start + BLOCK])
            flat.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
            lengths.append(np.fromiter(map(len, ids), np.int64))
        return cls(np.concatenate(flat), np.concatenate(lengths))

    def where(self, kept: np.ndarray) -> "Ragged":
        """Returns the sequences where ``kept: bool [n]``."""
        return Ragged(self.flat[np.repeat(kept, self.lengths)], self.lengths[kept])

    def padded(self, index: np.ndarray, length: int) -> np.ndarray:
        """Returns sequences ``index [b]`` and EOS as ``int32 [b, length]``, then PAD."""
        place, end = np.arange(length), self.lengths[index][:, None]
        inside = place < end
        at = np.where(inside, self._starts[index][:, None] + place, 0)
        ids = self.flat[at] if len(self.flat) else at.astype(np.int32)
        return np.where(inside, ids, np.where(place == end, np.int32(EOS), np.int32(PAD)))


class TextSource:
    """The tokenised pairs of a split, in memory, and the lengths they are padded to.

    ``counts`` says how many pairs were read, left out (by reason) and used. ``text`` holds the
    sentences of a split to evaluate, in the order of ``index``; None in training.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        text: pairs.Pairs,
        *,
        count: int = 1,
        max_length: int | None = None,
        edges: tuple[int, ...] = (),
        budget: bucketing.Budget | None = None,
    ):
        """Pads to ``edges``, and one more where pairs are longer, or to ``count`` lengths.

        Pairs with more tokens on a side, EOS included, than ``max_length`` (in training) or than
        the ``budget`` of an evaluation allows are left out.
        """
        self.tokenizers = tokenizers
        self.text = text if max_length is None else None
        self._source = Ragged.encode(tokenizers.source, text.sources)
        self._target = Ragged.encode(tokenizers.target, text.targets)
        self.lengths = np.maximum(self._source.lengths, self._target.lengths) + 1  # and EOS
        self.counts = dict(text.counts)
        most = budget.longest if budget else max_length
        if most is not None:
            kept = self.lengths <= most
            reason = f"left out: more than {most} tokens"
            if budget and not kept.all():
                needed = budget.tokens_for(int(self.lengths.max()))
                reason += f" (eval.batch_size={needed} would hold all)"
                self.text = text.where(kept)
            self.counts[reason] = int(np.sum(~kept))
            self._source, self._target = self._source.where(kept), self._target.where(kept)
            self.lengths = self.lengths[kept]
        self.counts["used"] = len(self)
        if not len(self):
            told = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
            raise ValueError(f"no pair of sentences is left to use ({told})")
        self.edges = edges or bucketing.make_edges(self.lengths, count)
        if (longest := int(bucketing.round_up(self.lengths).max())) > self.edges[-1]:
            self.edges = (*self.edges, longest)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a worker needs to make batches: the ids."""
        return {"_source": self._source, "_target": self._target}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of target tokens with EOS, the sum of an evaluation's masks."""
        return len(self._target.flat) + len(self)

    @property
    def summary(self) -> str:
        """Returns one line: pairs used, their shapes, and pairs left out."""
        sizes = " + ".join(str(t.size) for t in dict.fromkeys(self.tokenizers))
        dropped = [
            f"{count:,} {name}"
            for name, count in self.counts.items()
            if count and name.startswith("left out")
        ]
        if self.unknown:
            dropped.append(f"{self.unknown:.1%} of all tokens unknown")
        left_out = ", ".join(dropped) or "none left out"
        return (
            f"{len(self):,} pairs, {self.tokens:,} target tokens of a vocabulary of {sizes}, "
            f"padded to {'/'.join(map(str, self.edges))}, the longest {self.lengths.max():,}; "
            f"{left_out}"
        )

    @property
    def unknown(self) -> float:
        """Returns the share of unknown tokens; a large one means the wrong vocabulary."""
        both = (self._source.flat, self._target.flat)
        return float(np.mean(np.concatenate(both) == UNK))

    @property
    def order(self) -> str:
        """Identifies the batches: the number of pairs, their lengths, the vocabulary."""
        source, target = (x.flat.tobytes() for x in (self._source, self._target))
        words = zlib.crc32(target, zlib.crc32(source))
        lengths = zlib.crc32(self.lengths.astype("<i4").tobytes())
        return f"{len(self)} pairs of lengths {lengths:08x} and words {words:08x}"

    def members(self) -> tuple[np.ndarray, ...]:
        """Returns the numbers of the pairs in each bucket, in order."""
        bucket = np.searchsorted(self.edges, self.lengths)
        return tuple(np.flatnonzero(bucket == i).astype(np.int32) for i in range(len(self.edges)))

    def batch(self, index: np.ndarray, length: int) -> Batch:
        """Returns the pairs ``index [b]``, padded to ``length``."""
        target = self._target.padded(index, length)
        before = np.full((len(index), 1), EOS, np.int32)  # fairseq's decoder starts with EOS
        shifted = np.concatenate([before, target[:, :-1]], axis=1)
        inside = target != PAD
        return {
            "source": self._source.padded(index, length),
            "target_input": np.where(inside, shifted, np.int32(PAD)),
            "target": target,
            "mask": inside.astype(np.float32),
            "index": index.astype(np.int32),
        }


def open_train(options: schema.Text, tokenizers: Tokenizers | None = None) -> TextSource:
    """Returns the training split. Trains tokenizers on it unless they are given (a workdir's).

    Raises ValueError for data that is missing, damaged, or too little for the vocabulary.
    """
    text = pairs.read(options, options.train_split)
    if tokenizers is None and options.mock:
        words = Dictionary(pairs.mock_words(options))
        tokenizers = Tokenizers(words, words)
    tokenizers = tokenizers or create(options, text.sources, text.targets)
    return TextSource(tokenizers, text, count=options.buckets, max_length=options.max_length)


def open_eval(
    options: schema.Text,
    split: str,
    tokenizers: Tokenizers,
    edges: tuple[int, ...] = (),
    budget: bucketing.Budget | None = None,
) -> TextSource:
    """Returns a split to evaluate, with the vocabulary of training.

    ``edges``: the lengths of training, if it was opened; else the split gets lengths of its own.
    ``budget``: leaves out, and counts, the pairs of which a batch would exceed it; None: keeps all.
    """
    text = pairs.read(options, split)
    return TextSource(tokenizers, text, count=options.buckets, edges=edges, budget=budget)


def check_budget(source: TextSource, tokens: int, multiple: int) -> None:
    """Raises ValueError if a batch of ``tokens`` cannot hold ``multiple`` of the longest pairs."""
    bucketing.check_budget(source.edges, tokens, multiple)


def train_batches(
    source: TextSource,
    *,
    tokens: int,
    multiple: int,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields batches ``start`` to ``stop - 1``, this host's rows of each.

    ``tokens``: the budget of the global batch, of the longer side, padding included. Batch n is a
    function of (seed, n): hosts, threads and workers change nothing. Raises ValueError at once for
    a budget that is too small, or hosts that do not divide ``multiple``.
    """
    host, hosts = _shard(shard, multiple)
    check_budget(source, tokens, multiple)
    rows = bucketing.rows_of(source.edges, tokens, multiple)
    members = source.members()
    used = [bucket for bucket, those in enumerate(members) if len(those)]
    schedule = bucketing.Schedule(
        members=tuple(members[bucket] for bucket in used),
        rows=tuple(rows[bucket] for bucket in used),
        seed=seed,
    )

    def place(n: int) -> tuple[np.ndarray, int]:
        bucket, index = schedule.batch(n)
        return np.split(index, hosts)[host], source.edges[used[bucket]]

    made = loader.prefetch(source, place, start, stop, threads=threads, workers=workers)
    return (batch for _, batch in made)


def eval_batches(
    source: TextSource,
    *,
    budget: bucketing.Budget,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields every pair once, shortest bucket first, this host's rows of each batch.

    The last batch of a bucket is filled up with copies of its last pair under mask 0. A pair's
    own mask is never all 0, because its EOS counts.
    """
    host, hosts = _shard(shard, budget.multiple)
    rows = [budget.rows(edge) for edge in source.edges]
    members = source.members()
    plan = [
        (bucket, first)
        for bucket, those in enumerate(members)
        for first in range(0, len(those), rows[bucket])
    ]

    def wanted(n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of batch ``n`` in its bucket, and which of them exist."""
        bucket, first = plan[n]
        places = np.split(np.arange(first, first + rows[bucket]), hosts)[host]
        last = len(members[bucket]) - 1
        return np.minimum(places, last), places <= last

    def place(n: int) -> tuple[np.ndarray, int]:
        bucket, _ = plan[n]
        return members[bucket][wanted(n)[0]], source.edges[bucket]

    made = loader.prefetch(source, place, 0, len(plan), threads=threads, workers=workers)
    return (
        {**batch, "mask": batch["mask"] * wanted(n)[1][:, None]}
        for n, (_, batch) in enumerate(made)
    )


def _shard(shard: tuple[int, int], multiple: int) -> tuple[int, int]:
    host, hosts = shard
    if not 0 <= host < hosts:
        raise ValueError(f"shard {shard}: want (this host, hosts) with 0 <= this host < hosts")
    if multiple % hosts:
        raise ValueError(
            f"data.rows_multiple={multiple} is not divisible by the {hosts} hosts: take a multiple"
        )
    return host, hosts
