# SPDX-License-Identifier: Apache-2.0
"""Bounds the time that reads of a bucket take in libraries that retry without a message.

array_record retries for a quarter of an hour, tensorstore for as long as it is told to. Here a
read that takes long is logged, sent again every `store.STALL` seconds, and given up after the
retry limit of all clients (`store.LIMITS`).
"""

import atexit
import concurrent.futures
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from localglobal_jax.checkpoints import store

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
TELL = store.TELL_AFTER
POLL = 0.5  # seconds
LEAVING = 5.0  # seconds that the end of a process waits for calls that are not given up


class Future(Protocol[T_co]):
    """The methods that futures of tensorstore and of `concurrent.futures` have in common."""

    def result(self, timeout: float | None = None) -> T_co:
        """Returns the result, or raises TimeoutError after ``timeout`` seconds."""

    def done(self) -> bool:
        """Returns whether the result is there."""

    def add_done_callback(self, callback: Callable[[Any], Any], /) -> Any:
        """Calls ``callback`` with this future once the result is there."""


def first(
    future: Future[T],
    again: Callable[[], Future[T]],
    path: str,
    client: str,
    look: Callable[[], Future[None]] | None = None,
) -> T:
    """Returns the result of the first attempt that ends: ``future``, or one of ``again``.

    ``path``: the object that is read; ``client``: the library, a key of `store.SERVERS`; ``look``:
    starts to read the object with another client, whose error may give the reason. Raises the
    attempt's error, a ValueError of ``look``, or `store.StoreFailed` where no attempt ends within
    ``store.LIMITS.patience``.
    """
    began, patience = time.monotonic(), store.LIMITS.patience
    with contextlib.suppress(TimeoutError):
        return future.result(timeout=min(TELL, store.STALL, patience))
    if future.done():  # a TimeoutError of the attempt, or a result at the last moment
        return future.result()
    ended: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    future.add_done_callback(ended.put)
    looking = look() if look else None
    attempts = 1
    while (waited := time.monotonic() - began) < patience:
        failed = _failure(looking)
        if isinstance(failed, ValueError):  # it would stay
            raise failed
        if waited >= TELL:
            reason = f"no answer for {waited:.0f} s from {store.server_of(client)}"
            if failed:
                reason = failed.reason
            store.tell(path, reason, patience - waited)
        if waited > store.STALL * attempts:
            attempts += 1
            again().add_done_callback(ended.put)
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=POLL).result()
    if failed := _failure(looking):
        raise failed
    reason = f"no answer for {patience:.0f} s from {store.server_of(client)}"
    raise store.failure(path, 0, reason)


def _failure(looking: Any) -> store.StoreFailed | ValueError | None:
    """Returns the error of the store that a look at an object found."""
    found = looking.exception() if looking and looking.done() else None
    return found if isinstance(found, store.StoreFailed | ValueError) else None


class DaemonThreads:
    """A pool of at most `count` threads. A call that does not return keeps no process alive."""

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name
        self._numbers = itertools.count()
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # threads are not inherited
        atexit.register(self._leave)

    def _begin(self) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._running: set[_Call] = set()
        self._is_leaving = False

    def submit(self, do: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Starts ``do()`` once a thread is free."""
        call = _Call(do)
        self._calls.put(call)
        self._add()
        return call

    def running(self) -> int:
        """Returns the number of calls that run, also of those that were given up."""
        return len(self._running)

    def give_up(self, call: Any) -> None:
        """Drops a call; one that runs gets another thread in its place, and its own ends then."""
        if call.cancel() or call.done():
            return
        call.is_given_up = True
        with self._lock:
            self._started -= 1
        self._add()

    def _add(self) -> None:
        with self._lock:
            if self._started >= self._count:
                return
            self._started += 1
        name = f"{self._name} {next(self._numbers)}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while not self._is_leaving:
            call = self._calls.get()
            self._running.add(call)
            call.run()
            self._running.discard(call)
            if call.is_given_up:
                return
            del call  # else its result would stay in memory until the next one

    def _leave(self) -> None:
        """Waits for calls in native code, which would abort the process if they returned later."""
        self._is_leaving = True
        deadline = time.monotonic() + LEAVING
        while any(not call.is_given_up for call in list(self._running)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


class _Call(concurrent.futures.Future):
    """A future that knows its function."""

    is_given_up = False

    def __init__(self, do: Callable[[], Any]):
        super().__init__()
        self._do: Callable[[], Any] | None = do

    def run(self) -> None:
        do, self._do = self._do, None
        if not do or not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(do())
        except BaseException as error:
            self.set_exception(error)
