# SPDX-License-Identifier: Apache-2.0
"""Order, batches, hosts and prefetching of any kind of example.

The training stream is an endless list of positions: position p holds a record that is a function
of (seed, epoch, place in the epoch), and batch number ``step`` is the positions from
``step * batch_size`` on. So a run resumes by starting at its step, on any number of hosts: each
takes its contiguous part of every batch, and side by side the parts are the one-host batch,
augmentation included, because an example's randomness hangs on (seed, position) alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PositionRng:
    """Random numbers of consecutive positions ``first, first + 1, ...`` of a training stream.

    Philox is a function of (key, counter): the key is the seed and a stream, the counter the
    position. Nothing depends on which positions are drawn together.
    """

    seed: int
    first: int

    def uniforms(self, count: int, width: int) -> np.ndarray:
        """Returns ``float64 [count, width]`` in [0, 1) for the first ``count`` positions."""
        blocks = -(-width // 4)  # one tick of the counter yields four numbers
        philox = self._philox(0, [self.first * blocks, 0, 0, 0])
        bits = philox.random_raw(count * blocks * 4).reshape(count, blocks * 4)
        return (bits[:, :width] >> np.uint64(11)) * 2.0**-53

    def generator(self, offset: int, stream: int = 0) -> np.random.Generator:
        """Returns a generator for position ``first + offset`` and ``stream``."""
        return np.random.Generator(self._philox(stream + 1, [0, self.first + offset, 0, 0]))

    def _philox(self, stream: int, counter: list[int]) -> np.random.Philox:
        key = np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0]
        return np.random.Philox(
            key=np.array([key, stream], np.uint64), counter=np.array(counter, np.uint64)
        )


class Source(Protocol):
    """Random access to examples, a batch at a time. Called from several threads."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def batch(self, index: np.ndarray, draws: PositionRng | None) -> Batch:
        """Returns the examples ``index [b]`` as arrays ``[b, ...]``, with a float32 ``mask``.

        ``draws``: randomness of these positions in training, None in evaluation. A record that
        cannot be used keeps its slot with mask 0, so that nothing after it moves.
        """


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
) -> Iterator[Batch]:
    """Yields batches ``start`` to ``stop - 1`` of the stream, this host's part of each.

    ``batch_size`` is global, ``shard`` is (this host, hosts), ``threads`` batches are prepared at
    a time. Batches may straddle epochs. Each has ``mask`` and ``index: int32 [b]``, the record
    numbers. Raises ValueError for an empty source or an indivisible batch, at once; an error
    in a thread is raised by ``next``.
    """
    host, local = _part(source, batch_size, shard)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def make(step: int) -> Batch:
        first = step * batch_size + host * local
        index = np.array([order[p] for p in range(first, first + local)], np.int32)
        return {**source.batch(index, PositionRng(seed, first)), "index": index}

    return prefetch(make, start, stop, threads)


def eval_batches(
    source: Source, *, batch_size: int, shard: tuple[int, int] = (0, 1), threads: int = 2
) -> Iterator[Batch]:
    """Yields every record once, in order, this host's part of each batch.

    The last batch is padded with copies of the last record under mask 0, so that all hosts take
    the same number of steps and the masks of all of them sum to the size of the split.
    """
    host, local = _part(source, batch_size, shard)
    size = len(source)

    def make(step: int) -> Batch:
        first = step * batch_size + host * local
        wanted = np.arange(first, first + local)
        index = np.minimum(wanted, size - 1).astype(np.int32)
        batch = source.batch(index, None)
        mask = batch["mask"] * (wanted < size).astype(np.float32)
        return {**batch, "mask": mask, "index": index}

    return prefetch(make, 0, -(-size // batch_size), threads)


def _part(source: Source, batch_size: int, shard: tuple[int, int]) -> tuple[int, int]:
    """Returns the index of this host and its number of rows in a batch."""
    host, hosts = shard
    if not 0 <= host < hosts:
        raise ValueError(f"shard {shard}: want (this host, hosts) with 0 <= this host < hosts")
    if batch_size <= 0 or batch_size % hosts:
        raise ValueError(
            f"batch_size {batch_size} cannot be split over {hosts} hosts: take a multiple of them"
        )
    if len(source) == 0:
        raise ValueError("the split has no records: nothing to make batches of")
    return host, batch_size // hosts


def prefetch(make: Callable[[int], Batch], start: int, stop: int, threads: int) -> Iterator[Batch]:
    """Yields ``make(start), ..., make(stop - 1)``, made ahead of time in threads."""
    if stop <= start:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    iterator = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()  # else the threads would go on after an early exit
