# SPDX-License-Identifier: Apache-2.0
"""Opens the TFRecord files of a split through their index, and reads records by place."""

import os
from collections.abc import Sequence
from typing import Any

from localglobal_jax.data.tfds import gcs, ranges, tfrecord, tfrecord_index, trust

GAP = 4096  # bytes between two records that are read along, to save a request
LARGEST = 8 * 2**20  # bytes of a read that joins several records


class DamagedRecord(RuntimeError):
    """A record whose data disagrees with its checksum."""


class TFRecordFiles:
    """Files with their index. Thread-safe; a copy in another process opens the files for itself."""

    def __init__(self, instructions: Sequence[Any], folder: gcs.Place):
        """Loads the index.

        ``instructions``: TFDS's, each with ``filename`` and ``examples_in_shard``; ``folder``: that
        of the data set, where all of them have to be. Raises ValueError as `tfrecord_index.load`.
        """
        trust.refuse_elsewhere([one.filename for one in instructions], folder)
        self._directory = ranges.Directory(os.fspath(folder))
        self._names = [os.path.basename(one.filename) for one in instructions]
        lengths = [one.examples_in_shard for one in instructions]
        counts = dict(zip(self._names, lengths, strict=True))
        self._shards = tfrecord_index.load(self._directory, counts)
        # data of each record: offsets of its first byte and of the byte behind it
        self._bounds = {name: shard.bounds() for name, shard in self._shards.items()}

    def read(self, places: Sequence[tuple[int, int]]) -> list[bytes | DamagedRecord]:
        """Returns the records at ``places``: (number of a file, number of a record in it).

        All reads are started at once. A damaged record is returned as its error. Raises ValueError
        if a file is no longer the indexed one, else `ranges.ReadFailed` where one cannot be read.
        """
        runs: list[tuple[str, int, int]] = []
        inside = [(0, 0, 0)] * len(places)  # number of a run, begin and end in it
        for i in sorted(range(len(places)), key=places.__getitem__):
            file, record = places[i]
            name = self._names[file]
            begin, end = self._bounds[name][record].tolist()
            if runs and runs[-1][0] == name and _joins(runs[-1], begin, end):
                runs[-1] = name, runs[-1][1], end
            else:
                runs.append((name, begin, end))
            inside[i] = len(runs) - 1, begin - runs[-1][1], end - runs[-1][1]
        try:
            contents = self._directory.read(runs)
        except ranges.ReadFailed:
            self._raise_if(self.changed())
            raise
        return [
            # A slice of all of a bytes object is the object itself: most records are not copied.
            self._checked(contents[run][begin:end], *place)
            for (run, begin, end), place in zip(inside, places, strict=True)
        ]

    def _checked(self, data: bytes, file: int, record: int) -> bytes | DamagedRecord:
        name = self._names[file]
        shard = self._shards[name]
        if tfrecord.masked_crc(data) == int(shard.crcs[record]):
            return data
        self._raise_if(tfrecord_index.changed(self._directory, {name: shard}, record))
        return DamagedRecord("its checksum differs")

    def changed(self) -> str | None:
        """Returns which file was deleted or written since it was indexed; None where none was."""
        return tfrecord_index.changed(self._directory, self._shards)

    def _raise_if(self, change: str | None) -> None:
        if change:
            again = tfrecord_index.command(self._directory.path)
            raise ValueError(f"{change}. Restore it, or make the index again by {again}")


def _joins(run: tuple[str, int, int], begin: int, end: int) -> bool:
    """Returns whether a read of a record is best made one with the read before it."""
    return begin - run[2] <= GAP and end - run[1] <= LARGEST
