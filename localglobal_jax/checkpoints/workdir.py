# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one config, and at any time to one run.

Another one is refused before anything in it is touched.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from localglobal_jax.config import loading, schema, validation, values

log = logging.getLogger(__name__)


def refuse_other(run: schema.Run, workdir: pathlib.Path) -> None:
    """Raises ValueError if `workdir` holds a run that would have given other numbers."""
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:  # no path at all, such as one of a thousand letters
        raise ValueError(f"--workdir: {error.strerror}: {str(workdir)[:200]}") from error
    if not existing.is_dir():
        raise ValueError(f"--workdir {workdir}: {existing} is a file, give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--workdir {workdir}: no permission to write in {existing}")
    file = workdir / "config.json"
    if not file.exists():
        for name in ("checkpoints", "metrics.jsonl", "tensorboard"):
            if (workdir / name).exists():
                raise ValueError(
                    f"{workdir} has {name} but no config.json, so nobody knows what it is of: "
                    "restore the file or choose another --workdir"
                )
        return
    if changed := other_config(run, file):
        raise ValueError(
            f"{workdir} belongs to a run with another config:\n{changed}\n"
            "Choose another --workdir, or give the same config to resume. "
            f"(These may change: {', '.join(schema.MAY_CHANGE)}.)"
        )


def other_config(run: schema.Run, file: Any) -> str:
    """A line for every field in which `file`, a ``config.json``, is of other numbers than `run`."""
    return _changed(loading.read_json(file).model_dump(), run.model_dump(), "there", "now")


def check_config(workdir: pathlib.Path, step: int, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError unless `config.json` is what a checkpoint there was trained with."""
    file, saved = workdir / "config.json", metadata.get("config")
    if not saved:
        return
    then, now = (x.model_dump() for x in (validation.check(saved), loading.read_json(file)))
    if changed := _changed(then, now, f"in step {step}", "in the file"):
        raise ValueError(
            f"{file} is not the config of the checkpoints beside it:\n{changed}\n"
            "Restore it; `localglobal inspect --json` shows the config of every step"
        )


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], old_name: str, new_name: str) -> str:
    """A line for every field that differs and may not; empty if there is none."""
    return "\n".join(
        f"  {field}: {was!r} {old_name}, {now!r} {new_name}"
        for field, (was, now) in values.difference(old, new).items()
        if not any(field == free or field.startswith(f"{free}.") for free in schema.MAY_CHANGE)
    )


def reserve(run: schema.Run, workdir: pathlib.Path) -> None:
    """Writes `config.json`, atomically."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    write_atomically(workdir / "config.json", loading.to_json(run))


class Locked(OSError):
    """Another run has the workdir (exit code 1: it may be over soon)."""


class Lock:
    """Held from the first thing that a run writes to its last: no two write to one workdir.

    It is the kernel's (``flock``), so it ends with its process, however that ends: a killed run
    leaves a file that locks nothing. Readers ask for no lock. Of a ``gs://`` workdir it keeps away
    only other runs of this machine; a file system without locks is warned of.
    """

    def __init__(self) -> None:
        self._held: tuple[int, pathlib.Path] | None = None

    def take(self, file: pathlib.Path, patience: float = 120.0) -> None:
        """Locks `file`, or raises Locked with the process that holds it.

        A shared file system may take some time to notice that a machine is gone: where the owner
        is on another host, it is asked again for `patience` seconds.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        while self._held is None:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                host, other = _owner(os.read(handle, 1000).decode(errors="replace"))
                os.close(handle)
                if host in ("", socket.gethostname()) or time.monotonic() > deadline:
                    raise Locked(
                        f"another run is writing to this --workdir: {file} is locked by {other}. "
                        "Wait for it, stop it, or give another --workdir; if its machine is gone, "
                        "delete that file"
                    ) from None
                log.warning("waiting: %s is locked by %s", file, other)
                time.sleep(10)
                continue
            except OSError as error:
                log.warning("%s cannot be locked (%s): start one run at a time", file, error)
            if _is_at(handle, file):
                self._held = handle, file
            else:  # its last owner has just removed it
                os.close(handle)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # a full disk is found by what needs the room
            os.ftruncate(self._held[0], 0)
            os.write(self._held[0], json.dumps(owner).encode())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._held:
            handle, file = self._held
            with contextlib.suppress(OSError):  # why the run ended is the error to tell
                file.unlink(missing_ok=True)
            os.close(handle)
            self._held = None


def _owner(text: str) -> tuple[str, str]:
    """Its host, and all in words."""
    try:
        found = json.loads(text)
        return found["host"], f"pid {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "", "a process that is just starting"


def _is_at(handle: int, file: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def check_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError on a host that does not see what host 0 has claimed."""
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir {workdir} is not the directory that host 0 sees there: all hosts need a "
            "file system that they share"
        )


def write_atomically(file: pathlib.Path, text: str) -> None:
    """A reader, or a crash, sees the old file or the new one, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


@contextlib.contextmanager
def named_in_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Says of an OSError without a file name ("No space left on device") where it was."""
    try:
        yield
    except OSError as error:
        if type(error) is not OSError or error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(workdir)) from error


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """``gs://bucket/run`` is, ``runs/gs`` is not; ValueError for stores that nobody knows."""
    if not re.match(r"\w+:/", os.fspath(directory)):
        return False
    if not re.match(r"gs://[^/]+/.", os.fspath(directory)):
        raise ValueError(f"{directory}: want a local directory, or gs://BUCKET/PATH")
    return True
