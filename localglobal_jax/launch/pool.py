# SPDX-License-Identifier: Apache-2.0
"""Runs processes in slots: retries what crashes, restarts what saved, passes stop requests on.

Every process writes to ``log.txt`` of its folder, which it holds locked (the lock is inherited, so
it lasts as long as the process does, even if we are killed): nothing runs twice in one folder.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from localglobal_jax.launch import exit_codes, local

LOG, ATTEMPTS = "log.txt", "attempts.jsonl"
PAUSE = 0.1  # seconds between two looks at the children
SHORT, LONGEST = 60.0, 300.0  # seconds: of an attempt that got nowhere, and of a wait


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, and the folder that is its own."""

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path


@dataclasses.dataclass
class Outcome:
    """What became of a job: "done", "failed", "stopped", "not started" or "busy" (elsewhere)."""

    state: str = "not started"
    code: int | None = None
    attempts: int = 0
    crashes: int = 0
    short: int = 0  # attempts in a row that ended within a minute with 42
    ready: float = 0.0  # when it may start again


class Pool:
    """``Pool(slots, retries).run(jobs)``; `say` gets a line for whatever happens."""

    def __init__(
        self,
        slots: Sequence[local.Slot],
        retries: int,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], Any] = print,
    ):
        self._environment = dict(os.environ if environment is None else environment)
        self._slots, self._retries, self._say = list(slots), retries, say
        self._stops = 0

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Runs all; returns once no child is left."""
        outcomes = {job.name: Outcome() for job in jobs}
        waiting, free, children = deque(jobs), deque(self._slots), list[_Child]()
        with self._signals(children):
            try:
                while children or (waiting and not self._stops):
                    while free and not self._stops:
                        ready = [j for j in waiting if outcomes[j.name].ready <= time.monotonic()]
                        if not ready:
                            break
                        job, slot = ready[0], free.popleft()
                        waiting.remove(job)
                        child = self._start(job, slot, outcomes[job.name])
                        if not child:
                            free.append(slot)
                            continue
                        children.append(child)
                        if self._stops:  # asked for between the start and here
                            child.process.terminate()
                    time.sleep(PAUSE)
                    for child in [c for c in children if c.process.poll() is not None]:
                        children.remove(child)
                        free.append(child.slot)
                        if self._ended(child):
                            waiting.append(child.job)
            finally:
                for child in children:  # only if we ourselves fail
                    child.process.kill()
        return outcomes

    @property
    def stopped(self) -> bool:
        """Whether we were asked to stop."""
        return self._stops > 0

    def _start(self, job: Job, slot: local.Slot, outcome: Outcome) -> "_Child | None":
        job.directory.mkdir(parents=True, exist_ok=True)
        log = open(job.directory / LOG, "a", encoding="utf-8")  # noqa: SIM115, lives as the child
        if not _locked(log):
            log.close()
            outcome.state = "busy"
            self._say(f"busy     {job.name}: runs already, started by somebody else")
            return None
        outcome.attempts += 1
        again = f", attempt {outcome.attempts}" if outcome.attempts > 1 else ""
        environment = {**self._environment, **slot.environment()}
        with _affinity(slot.cores):
            process = subprocess.Popen(  # nosec B603 # an argument list, no shell
                job.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours: we pass it on, once
            )
        outcome.state = "running"
        _record(job, {"event": "start", "pid": process.pid})
        self._say(f"start    {job.name}  {slot}{again}")
        return _Child(job, slot, process, log, outcome, time.monotonic())

    def _ended(self, child: "_Child") -> bool:
        """Notes how; True if the job has to be started again."""
        code, job, outcome = child.process.returncode, child.job, child.outcome
        _record(job, {"event": "end", "code": code})
        child.log.close()
        outcome.code = code
        outcome.crashes += code not in (local.DONE, local.PREEMPTED)
        following = exit_codes.what_next(code, outcome.crashes, self._retries)
        lasted = time.monotonic() - child.since
        seconds = f"after {lasted:.0f} s"
        if following == "restart":  # the second one at once, then later and later
            outcome.short = outcome.short + 1 if lasted < SHORT else 0
            pause = min(2.0**outcome.short, LONGEST) if outcome.short > 1 else 0.0
            outcome.ready = time.monotonic() + pause
        if self._stops and code not in (local.DONE, local.WRONG, local.DIVERGED):
            outcome.state = "stopped"
            self._say(f"stopped  {job.name}  {seconds}: {exit_codes.explained(code)}")
            return False
        if following in ("restart", "retry"):
            left = f"{outcome.crashes} of {self._retries} retries" if following == "retry" else ""
            said = exit_codes.explained(code) + (f", {left}" if left else "")
            self._say(f"{following:<8} {job.name}  {seconds}: {said}")
            return True
        outcome.state = following
        self._say(f"{following:<8} {job.name}  {seconds}{self._why(job, code)}")
        return False

    def _why(self, job: Job, code: int) -> str:
        """For a run that failed: how, and the last thing that it said."""
        if code == local.DONE:
            return ""
        lines = (job.directory / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return (
            f": {exit_codes.explained(code)}; see {job.directory / LOG}\n         {last}".rstrip()
        )

    @contextlib.contextmanager
    def _signals(self, children: "list[_Child]") -> Iterator[None]:
        """SIGTERM and Ctrl-C go to the children as SIGTERM; at the third, as SIGKILL."""

        def stop(number: int, frame: Any) -> None:
            self._stops += 1
            for child in list(children):
                if child.process.poll() is None:
                    child.process.send_signal(signal.SIGTERM if self._stops < 3 else signal.SIGKILL)

        previous = {asked: signal.signal(asked, stop) for asked in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for asked, handler in previous.items():
                signal.signal(asked, handler)


@dataclasses.dataclass
class _Child:
    job: Job
    slot: local.Slot
    process: subprocess.Popen
    log: TextIO
    outcome: Outcome
    since: float


def is_locked(directory: pathlib.Path) -> bool:
    """Whether a process of a pool is running in there."""
    try:
        with open(directory / LOG, "rb") as log:
            return not _locked(log, tries=1, how=fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _locked(file: Any, tries: int = 10, how: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock. More than one try, as `is_locked` takes it for a moment."""
    for attempt in range(tries):
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except OSError:
            if attempt + 1 < tries:
                time.sleep(PAUSE)
    return False


def _record(job: Job, line: Mapping[str, Any]) -> None:
    """For `status`: a line says more than a silent log."""
    with open(job.directory / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")


@contextlib.contextmanager
def _affinity(cores: Sequence[int]) -> Iterator[None]:
    """Children that are started inside may use `cores` only (they inherit ours)."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
