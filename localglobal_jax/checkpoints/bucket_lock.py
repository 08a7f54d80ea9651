# SPDX-License-Identifier: Apache-2.0
"""Lock of a workdir in a bucket: an object that only its owner may replace or delete.

Every write of the object has the precondition ``ifGenerationMatch``: 0 to create it, else the
generation that the writer has seen. So of several processes exactly one succeeds. The owner writes
it anew every `BEAT` seconds. Another run takes it over after `LEASE` seconds without a beat, which
it watches for two beats at least, or at once if the owner was a process of this machine that has
ended. An owner that was cut off notices at its next write to the workdir, which begins by a beat.

Ages are differences of two times of the store (``updated`` and the header ``Date``), so no clock of
a machine counts.
"""

import contextlib
import datetime
import email.utils
import json
import logging
import math
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from localglobal_jax.checkpoints import store

BEAT = 30.0  # seconds; a beat is one request
LEASE = 120.0  # seconds; longer than a request that stalls once (`store.STALL`) and is repeated
FRESH = 5.0  # seconds for which a beat counts as a confirmation
LAST_PATIENCE = 5.0  # seconds, to delete the lock of a run that ends
log = logging.getLogger(__name__)


class Locked(OSError):
    """Another run writes to the workdir (exit code 1: a later attempt may succeed)."""


class _Found(NamedTuple):
    generation: str
    owner: dict[str, str]
    age: float  # seconds since it was written

    def __str__(self) -> str:
        """Names the owner."""
        known = {"pid": "?", "host": "?", "since": "?", "run": ""} | self.owner
        return "pid {pid} on {host}, since {since}".format(**known) + f" ({known['run']})"


class BucketLock:
    """The lock object `path`, held from `take` to `release`."""

    def __init__(self, path: epath.Path, run: str = ""):
        self._path = path
        self._bucket, _, self._key = os.fspath(path).removeprefix("gs://").partition("/")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._owner = {
            "id": uuid.uuid4().hex,
            "pid": str(os.getpid()),
            "host": socket.gethostname(),
            "since": now,
            "run": run,
            "machine": _machine(),
            "started": _started(os.getpid()),
        }
        self._generation, self._renewed = "", -math.inf
        self._lost = ""  # who took it over
        self._writing = threading.Lock()  # a beat and its generation are one
        self._ended = threading.Event()

    def take(self) -> None:
        """Returns once the lock is held.

        Raises Locked, naming the owner, as soon as the owner is known to be alive.
        """
        first: _Found | None = None
        while not (generation := self._write("0")):
            found = self._read()
            if found is None:  # released meanwhile
                continue
            if found.owner.get("id") == self._owner["id"]:
                generation = found.generation  # by a request whose answer was lost
                break
            here = _runs_here(found.owner)
            if first is None:
                first, begin = found, time.monotonic()
            if here or found.generation != first.generation:
                raise Locked(
                    f"another run is writing to this --workdir: {self._path} is locked by {found}. "
                    "Wait for it, stop it, or give another --workdir"
                )
            watched = time.monotonic() - begin
            if here is False or (found.age > LEASE and watched > 2 * BEAT):
                if generation := self._write(found.generation):
                    log.warning("%s: taken over from %s, which is gone", self._path, found)
                    break
                continue
            if not watched:
                most = max(LEASE - found.age, 2 * BEAT)
                log.warning("waiting for %s, %.0f s at most: locked by %s", self._path, most, found)
            time.sleep(BEAT / 6)
        self._generation = generation
        threading.Thread(target=self._beats, name="lock of the workdir", daemon=True).start()

    def confirm(self) -> None:
        """Renews the lock, if it is not `FRESH`; raises Locked if another run has taken it over."""
        with self._alone(store.LIMITS.left()):
            if self._lost or _now() - self._renewed > FRESH:
                self._beat()
            if self._lost:
                raise Locked(
                    f"{self._path} was taken over by {self._lost}: this run had not renewed it for "
                    f"{LEASE:.0f} s. It ends, and has written nothing since. Start one run at a "
                    "time in a --workdir"
                )

    def release(self) -> None:
        """Deletes the lock unless another run has taken it over; logs a failing store."""
        self._ended.set()
        with store.patience(LAST_PATIENCE):
            try:
                with self._alone(LAST_PATIENCE):
                    self._delete()
            except (FileNotFoundError, FileExistsError):  # deleted by hand, taken over
                return
            except OSError as error:
                log.error("the lock of the workdir stays for %.0f s: %s", LEASE, error)

    @contextlib.contextmanager
    def _alone(self, seconds: float) -> Iterator[None]:
        """Context manager without a beat under way; raises StoreFailed where one takes longer."""
        if not self._writing.acquire(timeout=max(seconds, store.LEAST)):
            reason = f"no answer from {store.server_of('gcsfs')}"
            raise store.failure(os.fspath(self._path), 0, reason)
        try:
            yield
        finally:
            self._writing.release()

    def _delete(self) -> None:
        """Deletes the object if it is this run's."""
        if self._lost:
            return
        if not self._generation:  # `take` failed; its request may have been done
            found = self._read()
            if not found or found.owner.get("id") != self._owner["id"]:
                return
            self._generation = found.generation
        self._call("DELETE", "b/{}/o/{}", self._bucket, self._key,
                   ifGenerationMatch=self._generation)  # fmt: skip

    def _beats(self) -> None:
        while not self._ended.wait(BEAT):
            with self._writing, contextlib.suppress(store.StoreFailed):  # the next may succeed
                if not self._ended.is_set():
                    self._beat()

    def _beat(self) -> None:
        if self._lost:
            return
        if generation := self._write(self._generation):
            self._generation = generation
            return
        found = self._read()
        if found and found.owner.get("id") == self._owner["id"]:
            self._generation = found.generation  # of a beat whose answer was lost
        else:
            self._lost = str(found) if found else "a process that has deleted it"

    def _write(self, generation: str) -> str:
        """Writes the object if it has this generation ("0": if there is none).

        Returns the new generation; empty if the object has another one.
        """
        begin = _now()
        about = {"name": self._key, "metadata": self._owner}
        parts = [("application/json; charset=UTF-8", json.dumps(about))]
        parts += [("application/json", json.dumps(self._owner))]  # to read it by hand
        text = "".join(f"--==0==\r\nContent-Type: {kind}\r\n\r\n{x}\r\n" for kind, x in parts)
        try:
            _, answer = self._call(
                "POST",
                self._files().upload_url(self._bucket),
                uploadType="multipart",
                ifGenerationMatch=generation,
                headers={"Content-Type": 'multipart/related; boundary="==0=="'},
                data=f"{text}--==0==--".encode(),
            )
        except FileExistsError:  # the precondition is not met
            return ""
        self._renewed = begin
        return json.loads(answer)["generation"]

    def _read(self) -> _Found | None:
        try:
            headers, answer = self._call("GET", "b/{}/o/{}", self._bucket, self._key)
        except FileNotFoundError:
            return None
        about = json.loads(answer)
        now = email.utils.parsedate_to_datetime(headers["Date"])
        written = datetime.datetime.fromisoformat(about["updated"])
        return _Found(
            about["generation"], about.get("metadata") or {}, (now - written).total_seconds()
        )

    def _call(self, *args: str, **options: Any) -> Any:
        return self._files().call(*args, **options)

    def _files(self) -> Any:
        import fsspec  # noqa: PLC0415 # only for buckets

        return fsspec.filesystem("gs", use_listings_cache=False)


def _now() -> float:
    """Returns seconds that count while the machine sleeps, unlike those of `time.monotonic`."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """Returns a name of this boot and this space of process numbers; empty without ``/proc``.

    Two containers of one machine may have the same host name and the same process numbers.
    """
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """Returns when a process of this machine started, in ticks; empty if it has ended."""
    with contextlib.suppress(OSError):
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    return ""


def _runs_here(owner: dict[str, str]) -> bool | None:
    """Returns whether the owner's process runs; None if it is not one of this machine."""
    if not owner.get("machine") or owner["machine"] != _machine():
        return None
    pid = owner.get("pid", "")
    return pid.isdigit() and owner.get("started") == (_started(int(pid)) or None)
