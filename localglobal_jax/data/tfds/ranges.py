# SPDX-License-Identifier: Apache-2.0
"""Reads byte ranges of the files of one directory, on disk or in a bucket, through tensorstore.

Reads are asynchronous, and wait without the interpreter's lock. tensorstore repeats requests that a
bucket turns down for the moment.
"""

import base64
import contextlib
import dataclasses
import functools
import io
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import fsspec.config
import google_crc32c
import tensorstore as ts

from localglobal_jax.checkpoints import store
from localglobal_jax.data.tfds import answers, gcs

# Requests in flight per directory. A request takes 30 to 60 ms, whatever it reads: with
# tensorstore's default of 32 a process would get at most about 1,000 records/s.
REQUESTS = 128
READS = 32  # at a time from a disk, which may be one of a network; tensorstore's default is 4
REQUESTS_VARIABLE = "TENSORSTORE_GCS_REQUEST_CONCURRENCY"  # tensorstore's own
CHUNK = 4 * 2**20  # bytes that `RangeFile` asks for at a time
AHEAD = 2  # chunks that it has asked for in advance


class ReadFailed(OSError):
    """A file that cannot be read at the moment; the message names it."""


@dataclasses.dataclass(frozen=True)
class Stat:
    """A file's size, and its generation: it changes whenever the file is written.

    ``generation``: a bucket's own number, or on disk the time of modification.
    ``crc``: the CRC-32C of the file where the bucket knows it.
    """

    size: int
    generation: str
    crc: int | None = dataclasses.field(default=None, compare=False)


class Directory:
    """A directory whose files are read in byte ranges. Thread-safe, and can be pickled.

    The store is opened by the first read of each process, since it has threads of its own.
    """

    def __init__(self, path: str):
        self._in_bucket = gcs.is_bucket(path)
        self.path = path.rstrip("/") if self._in_bucket else os.path.abspath(path)
        self._store: tuple[int, ts.KvStore] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Directory, (self.path,)

    def stats(self) -> dict[str, Stat]:
        """Returns file name -> `Stat`, never from a cache. Raises ValueError for no directory."""
        if self._in_bucket:
            listed = gcs.listing(self.path)
            return {name: _stat(stored) for name, stored in listed.items()}
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            raise ValueError(f"there is no directory {self.path}") from None
        found = {}
        for name in names:
            # a temporary file of another process may be gone since it was listed
            with contextlib.suppress(FileNotFoundError):
                found[name] = os.stat(os.path.join(self.path, name))
        return {name: Stat(s.st_size, _time(s.st_mtime_ns)) for name, s in found.items()}

    def start(self, name: str, begin: int, end: int) -> ts.Future:
        """Starts to read bytes ``begin`` to ``end - 1`` of a file."""
        return self._opened().read(name, byte_range=slice(begin, end))

    def read(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Reads many ranges (file name, begin, end) at once. Raises `ReadFailed`."""
        futures = [self.start(*one) for one in ranges]
        return [self.result(future, *one) for future, one in zip(futures, ranges, strict=True)]

    def result(self, future: ts.Future, name: str, begin: int, end: int) -> bytes:
        """Waits for a read that `start` began; in a bucket, sends it again where no answer comes.

        Raises ValueError without permission, `store.StoreFailed` where the bucket goes on failing,
        and `ReadFailed` for a range that cannot be read.
        """
        path = f"{self.path}/{name}"
        try:
            if self._in_bucket:
                again = functools.partial(self.start, name, begin, end)
                found = answers.first(future, again, path, "tensorstore")
            else:
                found = future.result(timeout=store.LIMITS.patience)
        except store.StoreFailed:
            raise
        except Exception as error:  # tensorstore maps its status codes to many classes
            failed = store.of_tensorstore(error, path)
            if failed and failed.is_final:
                raise ValueError(str(failed)) from error
            if failed:
                raise failed from error
            raise ReadFailed(f"cannot read {path}: {error}") from error
        if found.state != "value":
            raise ReadFailed(f"cannot read {path}: it is missing")
        return found.value

    def _opened(self) -> ts.KvStore:
        with self._lock:
            if self._store is None:
                self._store = os.getpid(), ts.KvStore.open(_spec(self.path)).result()
            opener, store = self._store
        if opener != os.getpid():  # tensorstore would abort the process
            raise ReadFailed(
                f"cannot read {self.path} in a process forked from the one that opened it: "
                'start the process by "spawn" or "forkserver"'
            )
        return store


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


def _stat(stored: gcs.Stored) -> Stat:
    crc = int.from_bytes(base64.b64decode(stored.crc32c), "big") if stored.crc32c else None
    return Stat(stored.size, stored.generation, crc)


def _spec(path: str) -> dict[str, Any]:
    context: dict[str, dict[str, Any]] = {}
    if not gcs.is_bucket(path):
        context["file_io_concurrency"] = {"limit": READS}
        return {"driver": "file", "path": f"{path}/", "context": context}
    bucket, _, inside = path.removeprefix("gs://").partition("/")
    # Ends, and gives its reason, before `answers.first` does.
    retries = {**store.TENSORSTORE, "max_retries": store.TENSORSTORE["max_retries"] - 1}
    context["gcs_request_retries"] = retries
    if not os.environ.get(REQUESTS_VARIABLE):
        context["gcs_request_concurrency"] = {"limit": REQUESTS}
    # The project that pays, where gcsfs has been given one: FSSPEC_GCS_REQUESTER_PAYS.
    payer = fsspec.config.conf.get("gcs", {}).get("requester_pays")
    if isinstance(payer, str):
        context["gcs_user_project"] = {"project_id": payer}
    return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/", "context": context}


class RangeFile(io.RawIOBase):
    """A file read from begin to end in chunks, the next ones asked for in advance.

    ``crc``: the CRC-32C of the chunks so far.
    """

    def __init__(self, directory: Directory, name: str, size: int):
        self.crc = 0
        self._directory, self._name = directory, name
        self._todo = ((begin, min(begin + CHUNK, size)) for begin in range(0, size, CHUNK))
        self._pending: deque[tuple[ts.Future, int, int]] = deque()
        self._chunk = memoryview(b"")
        for _ in range(AHEAD):
            self._ask()

    def _ask(self) -> None:
        if bounds := next(self._todo, None):
            self._pending.append((self._directory.start(self._name, *bounds), *bounds))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._chunk and self._pending:
            future, begin, end = self._pending.popleft()
            chunk = self._directory.result(future, self._name, begin, end)
            self._ask()
            self.crc = google_crc32c.extend(self.crc, chunk)
            self._chunk = memoryview(chunk)
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count
