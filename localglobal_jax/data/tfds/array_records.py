# SPDX-License-Identifier: Apache-2.0
"""Opens the ArrayRecord files of a split, on disk or in a bucket, and reads records by place.

`array_record` reads ``gs://`` itself. It stays silent about a file cut short (it counts zero
records and fails later), hence the check of every file's count when it is opened. Its errors do not
tell a store that fails from a damaged file, so after an error in a bucket the file is read by our
own client too.
"""

import concurrent.futures
import contextlib
import os
import re
import resource
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from array_record.python import array_record_module

from localglobal_jax.checkpoints import store
from localglobal_jax.data.tfds import answers, gcs, trust

READING_THREADS = 64  # one per file; it waits for the disk or the network, not for the processor
CLIENT = "array_record"
# array_record's words for an error of the store, and not of the contents of a file
FAILED_STORE = re.compile(
    r"(?:Permanent error|Retry policy exhausted|Error in non-idempotent operation)"
    r".*?(?=; reading gs://|$)",
    re.DOTALL,
)
SPARE_FILES = 256  # open files that the rest of a run may need
# Those of `array_record`'s own data source: records are read at random, so nothing is read ahead.
READER = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
THREADS = answers.DaemonThreads(READING_THREADS, "records")
T = TypeVar("T")


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
        self._begin()
        trust.refuse_elsewhere(self._paths, folder)
        _allow_open_files(len(self._paths))
        # In a bucket, what the files were when they were opened.
        self._stored = gcs.listing(folder) if gcs.is_bucket(folder) else None
        calls = [
            self._start(i, _count) if self._is_there(i) else None for i in range(len(self._paths))
        ]
        try:
            for i, call in enumerate(calls):
                if problem := self._problem(i, call):
                    raise ValueError(f"{problem}. Delete {folder} and prepare the data set again")
        except BaseException:
            _give_up(calls)
            raise

    def _begin(self) -> None:
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_readers", "_lock")
        return {key: value for key, value in vars(self).items() if key not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _problem(self, number: int, call: Any) -> str | None:
        """Returns what is wrong with a file. ``call``: that of `_count`; None if it is missing."""
        if call is None:
            return f"{self._paths[number]} is missing"
        problem = self._miscount(number, call)
        if problem and self._stored is not None:  # an answer that was cut off looks like damage
            problem = self._miscount(number, self._start(number, _count))
        return problem

    def _miscount(self, number: int, call: Any) -> str | None:
        """Returns what is wrong with the number of records that ``call`` counted."""
        path, expected = self._paths[number], self._expected[number]
        found, why = 0, ""
        try:
            if (found := self._result(call, number, _count)) == expected:
                return None
        except RuntimeError as error:
            why = f" ({error})"
        return f"{path} holds {found} readable records instead of {expected}: damaged{why}"

    def _is_there(self, number: int) -> bool:
        path = self._paths[number]
        if self._stored is None:
            return os.path.exists(path)
        return os.path.basename(path) in self._stored

    def _reader(self, number: int) -> Any:
        if (reader := self._readers[number]) is None:
            opened = array_record_module.ArrayRecordReader(self._paths[number], **READER)
            with self._lock:  # where two threads opened it, one reader stays
                if (reader := self._readers[number]) is None:
                    reader = self._readers[number] = opened
        return reader

    def _start(self, number: int, do: Callable[[Any], T]) -> "concurrent.futures.Future[T]":
        """Starts ``do(reader)`` of a file in another thread."""
        return THREADS.submit(lambda: do(self._reader(number)))

    def _result(
        self, call: "concurrent.futures.Future[T]", number: int, do: Callable[[Any], T]
    ) -> T:
        """Returns the result of a call of `_start`.

        In a bucket, a call is sent again where no answer comes, or where the store failed but has
        recovered. Raises RuntimeError for a file that cannot be read, and errors of the store:
        ValueError where it would fail again, else StoreFailed.
        """
        if self._stored is None:
            return call.result()
        path, calls = self._paths[number], [call]

        def again() -> "concurrent.futures.Future[T]":
            THREADS.give_up(calls[-1])
            self._readers[number] = None  # the next one has a connection of its own
            calls.append(self._start(number, do))
            return calls[-1]

        def look() -> "concurrent.futures.Future[None]":
            return THREADS.submit(lambda: gcs.check_readable(path, patience=0.0))

        for is_last in (False, True):
            try:
                return answers.first(calls[-1], again, path, CLIENT, look)
            except store.StoreFailed:
                THREADS.give_up(calls[-1])
                raise
            except RuntimeError as error:
                self._readers[number] = None
                if is_last and (found := FAILED_STORE.search(str(error))):
                    raise _refused(path, found[0]) from error
                _check_store(path, error)
            calls.append(self._start(number, do))
        raise AssertionError("the last attempt returns or raises")

    def read(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns the records at ``places``: (number of a file, number of a record in it).

        Files are read in parallel. Raises RuntimeError if one of the records cannot be read, and
        in a bucket the errors of the store: ValueError where a read would fail again, else
        `store.StoreFailed`.
        """
        by_file: dict[int, list[int]] = defaultdict(list)
        for i, (file, _) in enumerate(places):
            by_file[file].append(i)

        def reads(file: int) -> Callable[[Any], list[bytes]]:
            numbers = [places[i][1] for i in by_file[file]]
            return lambda reader: reader.read(numbers)

        if len(by_file) == 1 and self._stored is None:
            (file,) = by_file
            return reads(file)(self._reader(file))
        calls = [(file, do := reads(file), self._start(file, do)) for file in by_file]
        found = [b""] * len(places)
        try:
            for file, do, call in calls:
                records = self._result(call, file, do)
                for i, record in zip(by_file[file], records, strict=True):
                    found[i] = record
        except BaseException:
            _give_up(call for _, _, call in calls)
            raise
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


def _give_up(calls: Iterable[Any]) -> None:
    for call in calls:
        if call is not None:
            THREADS.give_up(call)


def _count(reader: Any) -> int:
    """Returns the number of records. Raises RuntimeError where the file cannot be read."""
    if not reader.ok():
        reader.close()  # raises the reason
    return reader.num_records()


def _check_store(path: str, error: RuntimeError) -> None:
    """Raises the error of the store behind an error of array_record, or `error` where none is."""
    if not FAILED_STORE.search(str(error)):
        raise error
    try:
        gcs.check_readable(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} was deleted after it had been found: restore it and run the same command "
            "again, or prepare the data set again"
        ) from error


def _refused(path: str, words: str) -> store.StoreFailed:
    """Returns the error of an object that gcsfs can read and array_record cannot."""
    return store.StoreFailed(
        f"{path}: {CLIENT} cannot read it from {store.server_of(CLIENT)} "
        f"({' '.join(words.split())[:200]}), gcsfs can from {store.server_of('gcsfs')}. Each finds "
        'its server and its credentials in its own way: see "Data in buckets" in configs/data.md'
    )


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
