# SPDX-License-Identifier: Apache-2.0
"""Order, batches, hosts and prefetching of any kind of example.

The training stream is an endless list of positions: position p holds a record that is a function
of (seed, epoch, place in the epoch), and batch number ``step`` is the positions from
``step * batch_size`` on. So a run resumes by starting at its step, on any number of hosts: each
takes its contiguous part of every batch, and side by side the parts are the one-host batch,
augmentation included, because an example's randomness hangs on (seed, position) alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np

from localglobal_jax.data import workers as processes

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

    def admit(self, index: np.ndarray) -> None:
        """Notes records that another process could not use, or raises its error."""


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields batches ``start`` to ``stop - 1`` of the stream, this host's part of each.

    ``batch_size`` is global, ``shard`` is (this host, hosts). ``threads`` batches are prepared at a
    time, or one in each of ``workers`` processes; neither number changes a batch. Batches may
    straddle epochs. Each has ``mask`` and ``index: int32 [b]``, the record numbers. Raises
    ValueError for an empty source or an indivisible batch, at once; an error in a thread or a
    process is raised by ``next``.
    """
    import grain  # noqa: PLC0415, it imports jax, which a worker does without

    host, local = _part(source, batch_size, shard)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def place(step: int) -> tuple[np.ndarray, PositionRng]:
        first = step * batch_size + host * local
        index = np.array([order[p] for p in range(first, first + local)], np.int32)
        return index, PositionRng(seed, first)

    def batches() -> Iterator[Batch]:
        made = prefetch(source, place, start, stop, threads=threads, workers=workers)
        with contextlib.closing(made):
            for (index, _), batch in made:
                yield {**_admitted(source, batch, index), "index": index}

    return batches()


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields every record once, in order, this host's part of each batch.

    The last batch is padded with copies of the last record under mask 0, so that all hosts take
    the same number of steps and the masks of all of them sum to the size of the split.
    """
    host, local = _part(source, batch_size, shard)
    size = len(source)

    def place(step: int) -> tuple[np.ndarray, None]:
        first = step * batch_size + host * local
        return np.minimum(np.arange(first, first + local), size - 1).astype(np.int32), None

    def batches() -> Iterator[Batch]:
        steps = -(-size // batch_size)
        made = prefetch(source, place, 0, steps, threads=threads, workers=workers)
        with contextlib.closing(made):
            for step, ((index, _), batch) in enumerate(made):
                first = step * batch_size + host * local
                inside = np.arange(first, first + local) < size
                mask = _admitted(source, batch, index)["mask"] * inside.astype(np.float32)
                yield {**batch, "mask": mask, "index": index}

    return batches()


def _admitted(source: Source, batch: Batch, index: np.ndarray) -> Batch:
    """Returns the batch, after the source of this process has noted its unusable records."""
    if not batch["mask"].all():
        source.admit(index[batch["mask"] == 0])
    return batch


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


def prefetch(
    source: Any,
    place: Callable[[int], tuple[Any, ...]],
    start: int,
    stop: int,
    *,
    threads: int,
    workers: int = 0,
) -> Generator[tuple[tuple[Any, ...], Batch], None, None]:
    """Yields ``(place(n), source.batch(*place(n)))`` of ``n`` from ``start`` to ``stop - 1``.

    The batches are made ahead of time, ``threads`` at a time in this process, or in ``workers``
    others.
    """

    def make(step: int) -> tuple[tuple[Any, ...], Batch]:
        arguments = place(step)
        return arguments, source.batch(*arguments)

    if workers and stop > start:
        requests = _in_threads(place, start, stop, 1)
        return processes.answers(source, requests, min(workers, stop - start))
    return _in_threads(make, start, stop, threads)


def _in_threads(
    make: Callable[[int], Any], start: int, stop: int, threads: int
) -> Generator[Any, None, None]:
    """Yields ``make(start), ..., make(stop - 1)``, made ahead of time in threads."""
    import grain  # noqa: PLC0415, see `train_batches`

    if stop <= start:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    iterator = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()  # else the threads would go on after an early exit
