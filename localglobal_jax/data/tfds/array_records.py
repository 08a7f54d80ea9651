# SPDX-License-Identifier: Apache-2.0
"""Opens the ArrayRecord files of a split, on disk or in a bucket, and reads records by place.

`array_record` reads ``gs://`` itself. It stays silent about a file cut short (it counts zero
records and fails later), hence the check of every file's count when it is opened.
"""

import concurrent.futures
import contextlib
import os
import resource
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from array_record.python import array_record_module

from localglobal_jax.data.tfds import gcs, trust

OPENING_THREADS = 32  # opening a file waits for the disk or the network, not for the processor
READING_THREADS = 64  # one per file that a batch reads from
SPARE_FILES = 256  # open files that the rest of a run may need
# Those of `array_record`'s own data source: records are read at random, so nothing is read ahead.
READER = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}


class ArrayRecordFiles:
    """Opened files. Thread-safe; a copy in another process opens its files when it reads them."""

    def __init__(self, instructions: Sequence[Any], folder: gcs.Place):
        """Opens and checks every file.

        ``instructions``: TFDS's, each with ``filename`` and ``examples_in_shard``; ``folder``: that
        of the data set, where all of them have to be. Raises ValueError for the first file that is
        missing, elsewhere, or holds another number of records.
        """
        self._folder = folder
        self._paths = [os.fspath(one.filename) for one in instructions]
        self._expected = [one.examples_in_shard for one in instructions]
        self._start()
        trust.refuse_elsewhere(self._paths, folder)
        _allow_open_files(len(self._paths))
        # In a bucket, what the files were when they were opened.
        self._stored = gcs.listing(folder) if gcs.is_bucket(folder) else None
        with concurrent.futures.ThreadPoolExecutor(OPENING_THREADS) as pool:
            for problem in pool.map(self._problem, range(len(self._paths))):
                if problem:
                    raise ValueError(f"{problem}. Delete {folder} and prepare the data set again")

    def _start(self) -> None:
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(READING_THREADS, "records")

    def __getstate__(self) -> dict[str, Any]:
        own = ("_readers", "_lock", "_pool")
        return {key: value for key, value in vars(self).items() if key not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _problem(self, number: int) -> str | None:
        """Returns what is wrong with a file, which it opens."""
        path, expected = self._paths[number], self._expected[number]
        if not self._is_there(path):
            return f"{path} is missing"
        reader = self._reader(number)
        if (found := reader.num_records()) == expected:
            return None
        why = ""
        try:
            reader.close()
        except RuntimeError as error:
            why = f" ({error})"
        return f"{path} holds {found} readable records instead of {expected}: damaged{why}"

    def _is_there(self, path: str) -> bool:
        if self._stored is None:
            return os.path.exists(path)
        return os.path.basename(path) in self._stored

    def _reader(self, number: int) -> Any:
        if self._readers[number] is None:
            reader = array_record_module.ArrayRecordReader(self._paths[number], **READER)
            with self._lock:  # where two threads opened it, one reader stays
                if self._readers[number] is None:
                    self._readers[number] = reader
        return self._readers[number]

    def read(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns the records at ``places``: (number of a file, number of a record in it).

        Files are read in parallel. Raises RuntimeError if one of the records cannot be read.
        """
        by_file = defaultdict(list)
        for i, (file, _) in enumerate(places):
            by_file[file].append(i)

        def read_file(file: int) -> list[bytes]:
            return self._reader(file).read([places[i][1] for i in by_file[file]])

        run = map if len(by_file) == 1 else self._pool.map
        found = [b""] * len(places)
        for file, records in zip(by_file, run(read_file, by_file), strict=True):
            for i, record in zip(by_file[file], records, strict=True):
                found[i] = record
        return found

    def changed(self) -> str | None:
        """Returns which file of a bucket was deleted or replaced since it was opened, and how.

        None where none was, and on disk: an opened file stays what it is when another takes its
        name.
        """
        if self._stored is None:
            return None
        now = gcs.listing(self._folder)
        for path in self._paths:
            name = os.path.basename(path)
            then = self._stored[name]
            if name not in now:
                return f"{path} was deleted"
            if now[name].generation != then.generation:
                return f"{path} was replaced: generation {then.generation}, now " + (
                    f"{now[name].generation}; {then.size} bytes, now {now[name].size}"
                )
        return None


def _allow_open_files(count: int) -> None:
    """Raises the process's limit of open files: a reader keeps its file open, ImageNet has 1,088.

    Where the system does not allow it, opening says so.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
