# SPDX-License-Identifier: Apache-2.0
"""Names a host that is lost, and ends the others with exit code 42, before jax aborts them.

The connections of the rendezvous stay open: every host has one to host 0. A closed connection, or
one without a sign of life for `heartbeat` seconds, is a lost host; host 0 tells the others which.
jax ends the other processes too, but by SIGABRT, without a name and 100 s after a network failure.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence

HEARTBEAT = 60.0  # seconds of silence, unless LOCALGLOBAL_HEARTBEAT says otherwise
LOST = 42  # exit code: start again; `launch.exit_codes` is a later package
GRACE = 30.0  # seconds in which a host may end after another one has ended with an error


def heartbeat() -> float:
    """Returns the seconds of silence after which a host is lost. Raises ValueError."""
    text = os.environ.get("LOCALGLOBAL_HEARTBEAT", f"{HEARTBEAT}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise ValueError(f"LOCALGLOBAL_HEARTBEAT={text}: want seconds, 1 to 86400")
    return seconds


class Watch:
    """Watches the other hosts in a thread, from the rendezvous to `stop`.

    `names`: host names by rank. `calls`: open connections by rank: host 0 has one to every other
    host, any other host has one to host 0. Raises ValueError for a wrong LOCALGLOBAL_HEARTBEAT.
    """

    def __init__(self, rank: int, names: Sequence[str], calls: Mapping[int, socket.socket]):
        self._rank, self._names, self._calls = rank, names, dict(calls)
        self._heard = dict.fromkeys(self._calls, time.monotonic())
        self._partial = dict.fromkeys(self._calls, b"")
        self._failed: dict[int, tuple[int, float]] = {}  # exit code and deadline, by rank
        self._heartbeat = heartbeat()
        self._stopped = False
        self._someone_left = threading.Event()
        self._selector = selectors.DefaultSelector()
        for number, call in self._calls.items():
            call.setblocking(False)
            self._selector.register(call, selectors.EVENT_READ, number)
        self._wait_for_a_name_before_aborting()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self, code: int) -> None:
        """Tells the other hosts that this one ends with `code`; their ends no longer matter to it.

        A second call, from the same end, says nothing.
        """
        if not self._stopped:
            self._stopped = True
            self._send(f"left {code:d}")

    def reason(self, seconds: float) -> str:
        """Returns which host ended, after at most `seconds`; "" if none said so.

        If one is lost, this process ends meanwhile.
        """
        self._someone_left.wait(seconds)
        return ", ".join(
            f"{self._name(number)} ended with exit code {code}"
            for number, (code, _) in self._failed.items()
        )

    def _name(self, number: int) -> str:
        return f"host {number} ({self._names[number]})"

    def _run(self) -> None:
        pause = min(5.0, self._heartbeat / 5)
        before = beat = time.monotonic()
        while (self._calls or self._failed) and not self._stopped:
            if (now := time.monotonic()) >= beat:
                beat = now + pause
                self._send("")
            for key, _ in self._selector.select(pause):
                self._read(key.data)
            now = time.monotonic()
            if now - before > 3 * pause + 1:  # this process was suspended
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            for number, (code, deadline) in self._failed.items():
                if now > deadline:
                    self._end(number, f"ended with exit code {code}")
            for number in self._calls:
                if now - self._heard[number] > self._heartbeat:
                    self._end(number, f"has been silent for {self._heartbeat:.0f} s")

    def _read(self, number: int) -> None:
        try:
            data = self._calls[number].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(number)
            self._end(number, "closed its connection")
        self._heard[number] = time.monotonic()
        *lines, self._partial[number] = (self._partial[number] + data).split(b"\n")
        for words in (line.decode(errors="replace").split(" ", 2) for line in lines if line):
            if words[0] == "left":
                self._left(number, int(words[1]))
            elif words[0] == "lost":
                self._end(int(words[1]), words[2])

    def _left(self, number: int, code: int) -> None:
        self._forget(number)
        if code not in (0, LOST):
            self._failed[number] = code, time.monotonic() + GRACE
            self._someone_left.set()

    def _forget(self, number: int) -> None:
        self._selector.unregister(self._calls.pop(number))

    def _send(self, line: str) -> None:
        for call in list(self._calls.values()):
            with contextlib.suppress(OSError):  # reading notices it
                call.send(f"{line}\n".encode())

    def _end(self, number: int, how: str) -> None:
        """Tells all hosts, then ends this process, unless it is ending already."""
        if self._stopped:
            return
        if self._rank == 0:
            self._send(f"lost {number} {how}")
        print(
            f"localglobal train: {self._name(number)} is lost: it {how}; "
            f"{self._name(self._rank)} ends. Start all hosts again: the run goes on from its last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)

    @staticmethod
    def _wait_for_a_name_before_aborting() -> None:
        """Delays SIGABRT by 6 s, in which the thread names the host and ends the process.

        jax aborts from a thread in C++ as soon as host 0 is gone; a handler in Python would not run
        there. The handler is ``sleep`` of libc itself, called with the number of the signal.
        """
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
