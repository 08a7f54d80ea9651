# SPDX-License-Identifier: Apache-2.0
"""Runs processes in slots: retries crashes, restarts preempted runs, forwards stop requests.

Every process writes to ``log.txt`` in its folder and holds a lock on that file. The lock is
inherited, so it lasts as long as the process, even if the launcher is killed: no two processes run
in one folder.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from localglobal_jax.launch import exit_codes
from localglobal_jax.launch.backend import Say, Started
from localglobal_jax.launch.exit_codes import FINAL, ExitCode

LOG, ATTEMPTS = "log.txt", "attempts.jsonl"
PAUSE = 0.1  # seconds between two looks at the children
SHORT = 60.0  # seconds; a preempted attempt shorter than this delays the next one
LONGEST = 300.0  # seconds; the longest such delay
DEFAULT_RETRIES = 2


@dataclasses.dataclass(frozen=True)
class Slot:
    """The cores and GPUs of one process; empty means unrestricted."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that restrict a process to these GPUs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}

    def __str__(self) -> str:
        parts = [("cores", self.cores), ("GPUs", self.gpus)]
        return ", ".join(f"{what} {','.join(map(str, items))}" for what, items in parts if items)


@dataclasses.dataclass(frozen=True)
class Job:
    """A command and its folder, which no other job shares."""

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path


@dataclasses.dataclass
class JobResult:
    """Result of a job. State: "done", "failed", "stopped", "not started" or "busy" (elsewhere)."""

    state: str = "not started"
    code: int | None = None
    attempts: int = 0
    crashes: int = 0
    short: int = 0  # consecutive attempts that were preempted within `SHORT` seconds
    ready: float = 0.0  # when it may start again


class Pool:
    """Runs jobs in slots: ``Pool(slots, retries).run(jobs)``; `say` gets a line per event."""

    def __init__(
        self,
        slots: Sequence[Slot],
        retries: int,
        environment: Mapping[str, str] | None = None,
        say: Say = print,
    ):
        self._environment = dict(os.environ if environment is None else environment)
        self._slots, self._retries, self._say = list(slots), retries, say
        self._stops = 0

    def run(self, jobs: Sequence[Job]) -> dict[str, JobResult]:
        """Runs all jobs and returns once no child is left."""
        outcomes = {job.name: JobResult() for job in jobs}
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
                for child in children:  # only if the pool itself fails
                    child.process.kill()
        return outcomes

    @property
    def stopped(self) -> bool:
        """Returns whether a signal asked the pool to stop."""
        return self._stops > 0

    def _start(self, job: Job, slot: Slot, outcome: JobResult) -> "_Child | None":
        job.directory.mkdir(parents=True, exist_ok=True)
        log = open(job.directory / LOG, "a", encoding="utf-8")  # noqa: SIM115, lives as the child
        if not _locked(log):
            log.close()
            outcome.state = "busy"
            self._say(f"busy     {job.name}: is running already, started by another launcher")
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
                start_new_session=True,  # Ctrl-C reaches the pool alone, which forwards it
            )
        outcome.state = "running"
        _record(job, {"event": "start", "pid": process.pid})
        self._say(f"start    {job.name}  {slot}{again}")
        return _Child(job, slot, process, log, outcome, time.monotonic())

    def _ended(self, child: "_Child") -> bool:
        """Records how a child ended; returns True if its job has to be started again."""
        code, job, outcome = child.process.returncode, child.job, child.outcome
        _record(job, {"event": "end", "code": code})
        child.log.close()
        outcome.code = code
        outcome.crashes += code not in (ExitCode.DONE, ExitCode.PREEMPTED)
        following = exit_codes.what_next(code, outcome.crashes, self._retries)
        lasted = time.monotonic() - child.since
        seconds = f"after {lasted:.0f} s"
        if following == "restart":  # the first at once, later ones with growing delays
            outcome.short = outcome.short + 1 if lasted < SHORT else 0
            pause = min(2.0**outcome.short, LONGEST) if outcome.short > 1 else 0.0
            outcome.ready = time.monotonic() + pause
        if self._stops and code not in (ExitCode.DONE, *FINAL):
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
        """Returns the exit code and last line of a job that failed; empty for one that is done."""
        if code == ExitCode.DONE:
            return ""
        lines = (job.directory / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return (
            f": {exit_codes.explained(code)}; see {job.directory / LOG}\n         {last}".rstrip()
        )

    @contextlib.contextmanager
    def _signals(self, children: "list[_Child]") -> Iterator[None]:
        """Context manager that forwards SIGTERM and Ctrl-C as SIGTERM, the third as SIGKILL."""

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
    slot: Slot
    process: subprocess.Popen
    log: TextIO
    outcome: JobResult
    since: float


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    retries: int | None,
    environment: Mapping[str, str],
    say: Say,
) -> Started:
    """Runs all jobs in a pool; returns their outcomes and the exit code of the whole."""
    pool = Pool(slots, DEFAULT_RETRIES if retries is None else retries, environment, say)
    outcomes = pool.run(jobs)
    states = [outcome.state for outcome in outcomes.values()]
    bad = "failed" in states or "busy" in states
    code = ExitCode.FAILED if bad else ExitCode.DONE
    say(f"{states.count('done')} of {len(jobs)} done, {states.count('failed')} failed")
    return Started(
        ExitCode.PREEMPTED if pool.stopped else code, {k: vars(v) for k, v in outcomes.items()}
    )


def is_locked(directory: pathlib.Path) -> bool:
    """Returns whether a process of a pool is running in `directory`."""
    try:
        with open(directory / LOG, "rb") as log:
            return not _locked(log, tries=1, how=fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _locked(file: Any, tries: int = 10, how: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock; tries several times, since `is_locked` holds it for a moment."""
    for attempt in range(tries):
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except OSError:
            if attempt + 1 < tries:
                time.sleep(PAUSE)
    return False


def _record(job: Job, line: Mapping[str, Any]) -> None:
    """Appends an event to ``attempts.jsonl``, which `status` reads."""
    with open(job.directory / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")


@contextlib.contextmanager
def _affinity(cores: Sequence[int]) -> Iterator[None]:
    """Context manager that restricts this process, and the children it starts, to `cores`."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
