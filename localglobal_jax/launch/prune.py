# SPDX-License-Identifier: Apache-2.0
"""Finds and deletes what a sweep no longer needs: old checkpoints, and workdirs of failed runs."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from localglobal_jax.checkpoints import gcs, manager, objects, steps, workdir
from localglobal_jax.inference import load
from localglobal_jax.launch import pool


class Candidate(NamedTuple):
    """A folder to delete: a step of a run that is over (`step`), or the workdir of a failed one."""

    run: str
    workdir: str
    step: int | None
    bytes: int
    why: str
    logs: str = ""  # of a failed run: the folder of its log and attempts

    @property
    def path(self) -> str:
        """The folder."""
        return self.workdir if self.step is None else f"{self.workdir}/checkpoints/{self.step}"


def candidates(rows: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """Returns the folders that may be deleted, by the rows of `status.read`.

    Of runs that are done or pruned, the checkpoints but the newest and the best by
    ``checkpoint.best``. Of runs that failed, the workdir. All other runs keep everything.
    """
    found = []
    for row in rows:
        directory = workdir.absolute(row["workdir"])
        over = row["state"] in ("done", pool.PRUNED)
        if row["state"] == "failed":
            used = sum(objects.sizes(directory).values())
            found.append(
                Candidate(row["name"], row["workdir"], None, used, row["note"], row["logs"])
            )
        elif over and row["saved"] is not None:
            kept, sizes = _kept(row["workdir"]), objects.sizes(directory / "checkpoints")
            for step in steps.scan(directory / "checkpoints"):
                used = sum(size for name, size in sizes.items() if name.startswith(f"{step}/"))
                if step not in kept:
                    why = f"step {step}; kept: {', '.join(map(str, sorted(kept)))}"
                    found.append(Candidate(row["name"], row["workdir"], step, used, why))
    return found


def _kept(path: str) -> set[int]:
    """Returns the newest step and the best one, if the run has a ``checkpoint.best``."""
    mirror = gcs.LocalMirror(path)
    checkpoints = manager.Checkpoints(mirror.checkpoints, load.read_run(mirror.local).checkpoint)
    return {max(checkpoints.steps()), *filter(None, [checkpoints.best()])}


def delete(candidate: Candidate) -> bool:
    """Deletes the folder; returns False, without deleting, if a run is writing to the workdir.

    Of a link to a folder both go. Raises OSError.
    """
    there = workdir.absolute(candidate.path)
    with _locked(candidate.workdir) as free:
        if not free:
            return False
        if workdir.is_remote(candidate.path):
            objects.delete_all(there, first=steps.MARKS if candidate.step is not None else ())
            logs = pathlib.Path(candidate.logs)
            for backend in pool.BACKENDS if candidate.logs else ():  # now it is "not started"
                file = logs.parents[1] / backend / logs.name / pool.ATTEMPTS
                file.unlink(missing_ok=True)
            return True
        if candidate.step is not None:  # an incomplete step is not read, if this is interrupted
            for mark in steps.MARKS:
                (pathlib.Path(there) / mark).unlink(missing_ok=True)
        shutil.rmtree(os.path.realpath(there))
        if os.path.islink(there):
            os.unlink(there)
    return True


@contextlib.contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Context manager that holds the locks of a workdir; False if another process has one."""
    with contextlib.ExitStack() as held:
        log = pathlib.Path(path) / pool.LOG
        if not workdir.is_remote(path) and log.exists():
            file = held.enter_context(open(log, "rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
        lock = held.enter_context(workdir.Lock())
        try:
            lock.take(gcs.LocalMirror(path).lock, patience=0.0, run="prune")
        except workdir.Locked:
            yield False
            return
        yield True
