# SPDX-License-Identifier: Apache-2.0
"""Checks and locks of a workdir: it belongs to one config and, at any time, to one run.

Another config or a second run raises an error before anything in the workdir is changed.
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
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from localglobal_jax.checkpoints import store
from localglobal_jax.checkpoints.bucket_lock import BucketLock, Locked
from localglobal_jax.config import loading, migrations, schema, values

MANIFEST = "files.json"  # of a step, written last: sizes and checksums of its files
log = logging.getLogger(__name__)
_SHOWN: dict[str, str] = {}  # directories of local mirrors, and the paths in buckets


def show_as(mirror: pathlib.Path, store: epath.Path) -> None:
    """Lets `shown` return paths below `store` for those below its local `mirror`."""
    _SHOWN[os.fspath(mirror)] = os.fspath(store)


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path as a message names it: that in the bucket for a file of a local mirror."""
    text = os.fspath(path)
    for mirror, there in list(_SHOWN.items()):  # a copy: other threads may add theirs
        if text == mirror or text.startswith(f"{mirror}/"):
            return there + text[len(mirror) :]
    return text


def refuse_other(run: schema.Run, workdir: pathlib.Path) -> None:
    """Raises ValueError if `workdir` is not writable or holds a run with another config."""
    try:
        str(workdir).encode()
    except UnicodeEncodeError:  # tensorstore takes no such path
        raise ValueError(
            f"--workdir {str(workdir).encode('utf-8', 'surrogateescape')!r} is not UTF-8: give "
            "another name"
        ) from None
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:  # not a valid path, such as one that is too long
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
                    f"{shown(workdir)} has {name} but no config.json, so its config is unknown: "
                    "restore the file or choose another --workdir"
                )
        return
    if changed := other_config(run, file):
        raise ValueError(
            f"{shown(workdir)} belongs to a run with another config:\n{changed}\n"
            f"Choose another --workdir (--config.init={shown(workdir)} starts it from these "
            "weights), or give the same config to resume. "
            f"(These may change: {', '.join(schema.MAY_CHANGE)}.)"
        )


def other_config(run: schema.Run, file: Any) -> str:
    """Returns one line for every field that differs between `file`, a ``config.json``, and `run`,
    without the fields of `schema.MAY_CHANGE`. A path is the same however it is written."""
    there = loading.read_json(file, name=shown(file))
    old, new = (
        loading.with_absolute_paths(each, without_links=True).model_dump()
        for each in (there, _as_begun(run, there))
    )
    return _changed(old, new, "there", "now")


def as_begun(run: schema.Run, workdir: pathlib.Path) -> schema.Run:
    """Returns `run` with the former values of fields that are newer than the run in `workdir`.

    A run thereby goes on as it began. Raises ValueError if its ``config.json`` is damaged.
    """
    file = workdir / "config.json"
    if not os.path.isfile(file):  # False also for a path that is too long, which is refused later
        return run
    kept = _as_begun(run, loading.read_json(file, name=shown(file)))
    if kept != run and run.data.name == "folder":
        log.warning(
            "pictures are not turned by their EXIF orientation: the run in %s began before "
            "data.exif_orientation existed. A new --workdir turns them",
            shown(workdir),
        )
    return kept


def _as_begun(run: schema.Run, there: schema.Run) -> schema.Run:
    if not (isinstance(run.data, schema.Images) and isinstance(there.data, schema.Images)):
        return run
    former = {k: v for k, v in migrations.FORMER.items() if getattr(there.data, k) == v}
    return run.model_copy(update={"data": run.data.model_copy(update=former)})


def check_config(workdir: pathlib.Path, step: int, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError unless `config.json` is the config that the checkpoint was trained with."""
    file, saved = workdir / "config.json", metadata.get("config")
    if not saved:
        return
    found = loading.read_json(file, name=shown(file))
    # init and label maps are read in training only; here they are absolute, there as given
    then, now = (
        x.model_dump(exclude={"init": True, "data": {"label_maps": True}})
        for x in (loading.from_saved(saved), found)
    )
    if changed := _changed(then, now, f"in step {step}", "in the file"):
        raise ValueError(
            f"{shown(file)} is not the config of the checkpoints beside it:\n{changed}\n"
            "Restore it; `localglobal inspect --json` shows the config of every step"
        )


def check_labels(labels: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Raises ValueError if a checkpoint was trained on other classes, or on another order."""
    then = metadata.get("labels")  # absent in older checkpoints
    if then and labels and in_one_form(then) != in_one_form(labels):
        raise ValueError(
            f"the data has the classes {_shown(labels)}; the checkpoint was trained on "
            f"{_shown(then)}, in this order. Provide the same classes (one folder each, which may "
            "be empty), or start another run"
        )


def in_one_form(labels: Iterable[str]) -> list[str]:
    """Returns labels in the Unicode form NFC; file systems of other machines keep another one."""
    return [unicodedata.normalize("NFC", label) for label in labels]


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:20]) + f" and {len(labels) - 20} more" * (len(labels) > 20)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], old_name: str, new_name: str) -> str:
    """Returns one line for every field that differs and must not; empty if there is none."""
    return "\n".join(
        f"  {field}: {was!r} {old_name}, {now!r} {new_name}"
        for field, (was, now) in values.difference(old, new).items()
        if not any(field == free or field.startswith(f"{free}.") for free in schema.MAY_CHANGE)
    )


def reserve(run: schema.Run, workdir: pathlib.Path) -> None:
    """Creates `workdir` and writes its ``config.json``, atomically."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    run = loading.with_absolute_paths(run)  # commands read it in any folder
    write_atomically(workdir / "config.json", loading.to_json(run))


class Lock:
    """Lock of a workdir for writing, held from the first file that a run writes to the last.

    It is a lock of the kernel (``flock``), released when its process ends in any way: the file that
    a killed run leaves locks nothing. Readers take no lock. In a bucket it is an object
    (`bucket_lock`). On a file system without locks a warning is logged.
    """

    def __init__(self) -> None:
        self._held: tuple[int, pathlib.Path] | None = None
        self._object: BucketLock | None = None

    def confirm(self) -> None:
        """Raises Locked if another run has taken over the lock, which only an object allows."""
        if self._object:
            self._object.confirm()

    def take(self, file: pathlib.Path | epath.Path, patience: float = 120.0, run: str = "") -> None:
        """Locks `file`; raises Locked, naming the process that holds it, and its `run`.

        A shared file system may notice late that a machine is gone: if the owner is on another
        host, the attempt is repeated for `patience` seconds.
        """
        if is_remote(file):
            self._object = BucketLock(epath.Path(file), run)
            self._object.take()
            return
        file = pathlib.Path(file)
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
            else:  # the previous owner has just removed it
                os.close(handle)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # a full disk is reported by the first real file
            os.ftruncate(self._held[0], 0)
            os.write(self._held[0], json.dumps(owner).encode())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._object:
            self._object.release()
            self._object = None
        if self._held:
            handle, file = self._held
            with contextlib.suppress(OSError):  # the error that ended the run must be reported
                file.unlink(missing_ok=True)
            os.close(handle)
            self._held = None


def _owner(text: str) -> tuple[str, str]:
    """Returns the host of the lock's owner, and a description of the owner."""
    try:
        found = json.loads(text)
        return found["host"], f"pid {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "", "a process that has just started"


def _is_at(handle: int, file: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def check_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError on a host that does not see the ``config.json`` that host 0 has written."""
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir {shown(workdir)} is not the directory that host 0 has written to: hosts "
            "need a shared file system"
        )


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
    """Writes `content` to `file`; a reader, or a crash, sees the old file or the new one.

    So does another writer. A link stays one, and a device or a pipe is written to.
    """
    content = content.encode() if isinstance(content, str) else content
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    file = pathlib.Path(os.path.realpath(file))
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


@contextlib.contextmanager
def named_in_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager that adds `workdir` to an OSError without a file name, such as ENOSPC."""
    try:
        yield
    except OSError as error:
        if type(error) is not OSError or error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(workdir)) from error


def is_remote(directory: str | os.PathLike[str]) -> bool:
    """Returns whether `directory` is on Google Cloud Storage (``gs://bucket/run``).

    Raises ValueError for other stores, such as ``s3://``.
    """
    if not re.match(r"\w+:/", os.fspath(directory)):
        return False
    if bucket := re.fullmatch(r"gs://([^/]+)/*", os.fspath(directory)):
        raise ValueError(
            f"{directory} is a whole bucket: give a path in it, such as gs://{bucket[1]}/runs/one"
        )
    if not re.match(r"gs://[^/]+/.", os.fspath(directory)):
        raise ValueError(f"{directory}: give a local directory, or gs://BUCKET/PATH")
    store.prepare()
    return True


def check_local(option: str, path: str | os.PathLike[str], kind: str) -> None:
    """Raises ValueError where `path`, the value of `option`, is an address: ``gs://``, ``s3://``.

    ``kind``: folder or file, which is written on this machine only.
    """
    if re.match(r"\w+:/", os.fspath(path)):
        raise ValueError(f"{option} {path}: give a local {kind}, and upload it")


def check_exists(path: str | os.PathLike[str], error: Callable[[epath.Path], ValueError]) -> None:
    """Raises ``error(path)`` if the path is local and does not exist.

    For commands: a second earlier than the code that reads it, which imports jax.
    """
    if not re.match(r"\w+:/", os.fspath(path)) and not os.path.exists(path):
        raise error(absolute(path))


def without_checkpoint(path: epath.Path) -> ValueError:
    """Returns the error of a path at which there is no checkpoint."""
    return ValueError(
        f"no checkpoint in {path}: expected a workdir (with checkpoints/<step>/), "
        "its checkpoints directory, or one step directory"
    )


def without_config(workdir: str | os.PathLike[str]) -> ValueError:
    """Returns the error of a directory that is not a workdir."""
    return ValueError(
        f"{shown(workdir)} is not a workdir: it has no config.json. "
        "Give the directory that `localglobal train --workdir` wrote to"
    )


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns `path` with ``~`` expanded, as an absolute path; a path in a bucket as it is.

    `epath` would put the current directory before ``gs://``. Raises ValueError as `is_remote`.
    """
    if is_remote(path):
        store.check_path(path)
        return epath.Path(path)
    return epath.Path(epath.Path(path).expanduser().absolute())
