# SPDX-License-Identifier: Apache-2.0
"""Batches made in other processes, which do not share the interpreter's lock.

A worker gets the source once and then one request after the other, and answers each with a batch.
Messages are pickles, whose arrays are passed as shared memory that has no name: a file descriptor
goes through a socket. So arrays are not copied into this process, data sets in memory are shared by
all workers, and nothing is left behind however a process ends. A worker ends when its socket is
closed, thus also with a parent that was killed.

`grain`'s ``mp_prefetch`` was tried first (0.2.18). Workers of a killed parent went on for ever, and
shared memory stayed; a worker took 200 MB, because it imports jax; an early end printed tracebacks.
"""

import collections
import contextlib
import logging
import mmap
import os
import pickle  # nosec B403, between this process and its children
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from typing import Any

DEPTH = 2  # requests that a worker has at a time: it finds the next when it has done one
ALIGNMENT = 64  # bytes
WAITS = "localglobal_jax.checkpoints.store"  # logs that an object is waited for
IGNORED = (signal.SIGINT, signal.SIGTERM)  # sent to all processes; this one decides when to end
# sys.path is the parent's: a script's folder, or the tests'
PROGRAM = """
import sys
sys.path[:] = sys.argv[2:]
from localglobal_jax.data import workers
workers.serve(int(sys.argv[1]))
"""


class WorkerDied(RuntimeError):
    """A worker ended before its work was done."""


def answers(
    source: Any, requests: Generator[tuple[Any, ...], None, None], count: int
) -> Generator[tuple[tuple[Any, ...], Any], None, None]:
    """Yields ``(request, source.batch(*request))`` in order, made by ``count`` processes.

    The source is pickled. ``count * DEPTH`` answers are made ahead of time and wait in memory. An
    exception in a worker is raised here, when its turn comes; `WorkerDied` if a worker was killed.
    """
    if not hasattr(socket, "send_fds"):
        raise ValueError(
            f"data.workers={count}: this system cannot pass shared memory between processes. "
            "Set data.workers=0"
        )
    pool: list[_Worker] = []
    waiting: collections.deque[tuple[_Worker, tuple[Any, ...]]] = collections.deque()
    try:
        shared = _pack(source)
        try:
            pool += [_Worker(shared, number, count) for number in range(count)]
        finally:
            os.close(shared)
        for number, request in enumerate(requests):
            if len(waiting) == count * DEPTH:
                worker, first = waiting.popleft()
                yield first, worker.receive()
            pool[number % count].send(request)
            waiting.append((pool[number % count], request))
        while waiting:
            worker, first = waiting.popleft()
            yield first, worker.receive()
    finally:
        requests.close()
        for worker in pool:
            worker.kill()


class _Worker:
    """A process and the socket that leads to it."""

    def __init__(self, source: int, number: int, count: int):
        self._name = f"input process {number + 1} of {count} (data.workers)"
        self._socket, other = socket.socketpair()
        command = [sys.executable, "-c", PROGRAM, str(other.fileno()), *sys.path]
        with other, _blocked(IGNORED):  # the process inherits that
            self._process = subprocess.Popen(  # nosec B603, an argument list, no shell
                command,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},  # no worker may take an accelerator
            )
        with contextlib.suppress(ConnectionError):  # `receive` says why it died
            socket.send_fds(self._socket, [b"s"], [source])

    def send(self, request: tuple[Any, ...]) -> None:
        with contextlib.suppress(ConnectionError):
            _send(self._socket, request)

    def receive(self) -> Any:
        found = []
        with contextlib.suppress(ConnectionError):
            found = _receive(self._socket)
        if not found:
            raise WorkerDied(self._death())
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def _death(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return f"{self._name} closed its connection"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        why = ". The machine may be out of memory" if code == -signal.SIGKILL else ""
        return (
            f"{self._name} {how}{why}. Start again to resume, with fewer data.workers or "
            "data.threads if it happens again; data.workers=0 makes batches without such processes"
        )

    def kill(self) -> None:
        self._socket.close()
        self._process.kill()  # it only reads
        self._process.wait()


@contextlib.contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Context manager that blocks signals for this thread, and for processes started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------- in the worker


def serve(descriptor: int) -> None:
    """Answers requests from a socket until it is closed: the whole life of a worker."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # The parent looks at bad records again, and reports them once. It does not see waits.
    logging.getLogger().setLevel(logging.CRITICAL)
    logging.getLogger(WAITS).setLevel(logging.WARNING)
    parent = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the parent was killed
        [source] = _receive(parent, mmap.ACCESS_READ)
        while found := _receive(parent):
            _send(parent, _answer(source, found[0]))


def _answer(source: Any, request: tuple[Any, ...]) -> Any:
    """Returns a batch, or the exception."""
    try:
        return source.batch(*request)
    except Exception as error:
        error.add_note(f"In a process of data.workers:\n{traceback.format_exc()}")
        return error


def _end_with(parent: socket.socket) -> None:
    """Ends this process when the socket's other end is closed, whatever it is doing."""
    waiting = select.poll()
    waiting.register(parent, select.POLLHUP)
    waiting.poll()
    os._exit(0)


# --------------------------------------------------------------------------------------- messages


def _send(to: socket.socket, value: Any) -> None:
    try:
        memory = _pack(value)
    except Exception as error:  # an exception that cannot be pickled
        if not isinstance(value, Exception):
            raise
        memory = _pack(RuntimeError(f"{type(value).__name__}: {value} ({error})"))
    try:
        socket.send_fds(to, [b"m"], [memory])
    finally:
        os.close(memory)


def _receive(source: socket.socket, access: int = mmap.ACCESS_WRITE) -> list[Any]:
    """Returns a list of the next value; an empty one if the other end is closed."""
    _, found, _, _ = socket.recv_fds(source, 1, 1)
    if not found:
        return []
    try:
        return [_unpack(found[0], access)]
    finally:
        os.close(found[0])


def _pack(value: Any) -> int:
    """Returns a descriptor of memory that holds ``value``, its arrays aligned.

    A header of the number of parts and their lengths, the pickle, and the buffers of its arrays.
    """
    parts: list[Any] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=lambda b: parts.append(b.raw()))
    parts.insert(0, pickled)
    sizes = [len(part) for part in parts]
    memory = _memory()
    with open(memory, "wb", closefd=False) as file:
        file.write(struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes))
        for part in parts:
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            file.write(part)
        file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    return memory


def _unpack(memory: int, access: int) -> Any:
    """Returns what `_pack` wrote. Its arrays lie in that memory, which is freed with the last."""
    mapped = memoryview(mmap.mmap(memory, 0, access=access))
    (count,) = struct.unpack_from("<Q", mapped)
    at, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}Q", mapped, 8):
        at = -(-at // ALIGNMENT) * ALIGNMENT
        parts.append(mapped[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])  # nosec B301, of a process of ours


def _memory() -> int:
    """Returns a descriptor of memory without a name, which is freed with the last one open.

    Linux bounds it by all memory; /dev/shm, 64 MB in a container, would be too small.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("localglobal")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
