# SPDX-License-Identifier: Apache-2.0
"""Runs processes in slots: retries crashes, restarts preempted runs, forwards stop requests.

Every process writes to ``log.txt`` in its folder and holds a lock on that file. The lock is
inherited, so it lasts as long as the process, even if the launcher is killed: no two processes run
in one folder. A job whose lock is taken runs elsewhere: the pool waits for its end, and starts it
again if it has not finished.
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
from typing import Any, Protocol, TextIO

from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.launch import exit_codes
from localglobal_jax.launch.backend import Say, Started
from localglobal_jax.launch.exit_codes import FINAL, ExitCode
from localglobal_jax.launch.expand import Description
from localglobal_jax.training.reporting import log_reason

LOG, ATTEMPTS = "log.txt", "attempts.jsonl"
BACKENDS = ("local", "tpu-vm")  # whose runs a pool starts
PRUNED = "pruned"  # the last event of a run that a search has stopped for good
PAUSE = 0.1  # seconds between two looks at the children
GRACE = 60.0  # seconds from SIGTERM to SIGKILL, if the pool itself fails
SHORT = 60.0  # seconds; a preempted attempt shorter than this delays the next one
LONGEST = 300.0  # seconds; the longest such delay
DEFAULT_RETRIES = 2
LOOK = 1.0  # seconds between two looks at a job that another launcher runs
MOST_IDLE = 10  # consecutive preempted attempts that saved nothing; then the job has failed
LEFT = {"not started", "stopped", "busy"}  # states of jobs that the next pool goes on with
ALIKE = 3  # consecutive runs refused for one reason (data not prepared); then no other is started


@dataclasses.dataclass(frozen=True)
class Slot:
    """The cores and GPUs of one process; no cores, and None for GPUs, mean unrestricted."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that restrict a process to these GPUs."""
        if self.gpus is None:
            return {}
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return visible if self.gpus else {**visible, "JAX_PLATFORMS": "cpu"}

    def __str__(self) -> str:
        parts = [("cores", self.cores), ("GPUs", self.gpus)]
        return ", ".join(f"{what} {','.join(map(str, items))}" for what, items in parts if items)


@dataclasses.dataclass(frozen=True)
class Job:
    """A command and its folder, which no other job shares.

    `saved` returns the newest saved step, None without one; the job has finished at step `steps`.
    """

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path
    saved: Callable[[], int | None] | None = None
    steps: int = 0

    def saved_step(self) -> int | None:
        """Returns the newest saved step; None if there is none, or if it is not known."""
        with contextlib.suppress(OSError, ValueError):  # of a store: it is looked up again
            return self.saved() if self.saved else None
        return None

    def finished(self) -> bool:
        """Returns whether the last step is saved."""
        return (self.saved_step() or 0) >= self.steps > 0


@dataclasses.dataclass
class JobResult:
    """Result of a job.

    State: "done", "failed", "pruned", "stopped", "not started" or "busy" (elsewhere).
    """

    state: str = "not started"
    code: int | None = None
    attempts: int = 0
    crashes: int = 0
    short: int = 0  # consecutive attempts that were preempted within `SHORT` seconds
    idle: int = 0  # consecutive attempts that were preempted and saved nothing
    ready: float = 0.0  # when it may start again
    reason: str = ""  # of the last failure

    def delay(self, lasted: float) -> None:
        """Sets when a preempted job starts again: first at once, later with growing delays.

        `lasted`: the seconds of its last attempt.
        """
        self.short = self.short + 1 if lasted < SHORT else 0
        pause = min(2.0**self.short, LONGEST) if self.short > 1 else 0.0
        self.ready = time.monotonic() + pause


class Source(Protocol):
    """Draws jobs while others run, and gives up those that are not promising."""

    def next_job(self) -> Job | None:
        """Returns the next job; None if there is no other."""

    def gives_up(self, job: Job) -> bool:
        """Returns whether a running job is to be stopped."""

    def states(self) -> list[str]:
        """Returns the state of every job of the source, also of earlier and other pools."""


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
        self._refusals: list[str] = []  # reasons of the newest runs, if these were refused
        self._began = time.time()

    def run(
        self,
        jobs: Sequence[Job],
        source: Source | None = None,
        ended: Callable[[Job, JobResult], Any] = lambda job, outcome: None,
    ) -> dict[str, JobResult]:
        """Runs all jobs, and those of a `source`, and returns once no child is left.

        `ended`: called with the outcome of each job that this pool does not start again.
        """
        outcomes = {job.name: JobResult() for job in jobs}
        waiting, free, children = deque(jobs), deque(self._slots), list[_Child]()
        drawing = source is not None
        with self._signals(children):
            try:
                while children or ((waiting or drawing) and not self._starts_none):
                    while free and not self._starts_none:
                        job = _next_ready(waiting, outcomes)
                        if job is None and source and drawing:
                            job = source.next_job()
                            drawing = job is not None
                            outcomes |= {job.name: JobResult()} if job else {}
                        if job is None:
                            break
                        child = self._start(job, free[0], outcomes[job.name])
                        if child:
                            free.popleft()
                            children.append(child)
                            if self._stops:  # asked for between the start and here
                                child.process.terminate()
                        elif outcomes[job.name].state == "busy":
                            waiting.append(job)
                        else:
                            ended(job, outcomes[job.name])
                    time.sleep(PAUSE)
                    for child in [c for c in children if c.process.poll() is not None]:
                        children.remove(child)
                        free.append(child.slot)
                        if self._ended(child):
                            waiting.append(child.job)
                        else:
                            ended(child.job, child.outcome)
                    for child in children if source else ():
                        self._prune_unpromising(child, source)
            finally:
                self._end(children)  # none is left unless the pool itself fails
        for job in waiting:  # saved, or to be tried again: by the next pool
            if outcomes[job.name].state == "running":
                outcomes[job.name].state = "stopped"
        return outcomes

    @property
    def stopped(self) -> bool:
        """Returns whether a signal asked the pool to stop."""
        return self._stops > 0

    @property
    def refused(self) -> bool:
        """Returns whether the newest `ALIKE` runs were refused for one reason."""
        return len(self._refusals) >= ALIKE

    @property
    def _starts_none(self) -> bool:
        return self.stopped or self.refused

    def _start(self, job: Job, slot: Slot, outcome: JobResult) -> "_Child | None":
        """Starts a job; None if another launcher runs it ("busy"), or if it needs no start."""
        try:
            job.directory.mkdir(parents=True, exist_ok=True)
            log = open(job.directory / LOG, "a", encoding="utf-8")  # noqa: SIM115, lives as the child
        except OSError as error:
            self._not_startable(job, outcome, error)
            return None
        if not _locked(log, tries=3):
            log.close()
            if outcome.state != "busy":
                self._say(f"busy     {job.name}: another launcher runs it; waiting for its end")
            outcome.state, outcome.ready = "busy", time.monotonic() + LOOK
            return None
        taken_over = "taken over" if outcome.state == "busy" else ""
        if _over(job, outcome, self._began):
            log.close()
            self._say(f"{outcome.state:<8} {job.name}: {outcome.reason or 'it has ended already'}")
            return None
        outcome.attempts += 1
        again = f"attempt {outcome.attempts}" if outcome.attempts > 1 else ""
        environment = {**self._environment, **slot.environment()}
        begin, kills, saved = log.tell(), log_reason.memory_kills(), job.saved_step()
        try:
            with _affinity(slot.cores):
                process = subprocess.Popen(  # nosec B603 # an argument list, no shell
                    job.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the pool alone, which forwards it
                )
        except OSError as error:  # no memory for a process
            log.close()
            self._not_startable(job, outcome, error)
            return None
        outcome.state = "running"
        self._record(job, {"event": "start", "pid": process.pid, "log": begin})
        said = ", ".join(filter(None, [str(slot), again, taken_over]))
        self._say(f"start    {job.name}  {said}".rstrip())
        return _Child(job, slot, process, log, outcome, time.monotonic(), begin, kills, saved)

    def _prune_unpromising(self, child: "_Child", source: Source | None) -> None:
        """Stops a child that its source gives up; looks once in `LOOK` seconds."""
        if child.pruned or source is None or time.monotonic() < child.looked + LOOK:
            return
        child.looked = time.monotonic()
        if source.gives_up(child.job):
            child.pruned = True
            child.process.terminate()

    def _end(self, children: "Sequence[_Child]") -> None:
        """Stops children: by SIGTERM, at which they save, and by SIGKILL after `GRACE` seconds."""
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + GRACE
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            child.process.kill()
            code = child.process.wait()
            following = {} if code in FINAL else {"next": "stopped"}
            self._record(child.job, {"event": "end", "code": code, **following})
            child.log.close()

    def _not_startable(self, job: Job, outcome: JobResult, error: OSError) -> None:
        """Marks a job that this machine cannot start as failed; the others go on."""
        outcome.state, outcome.reason = "failed", f"cannot be started: {error}"
        self._say(f"failed   {job.name}  {outcome.reason}")

    def _ended(self, child: "_Child") -> bool:
        """Records how a child ended; returns True if its job has to be started again."""
        code, job, outcome = child.process.returncode, child.job, child.outcome
        lasted = time.monotonic() - child.since
        kills = log_reason.memory_kills() - child.kills
        outcome.code, outcome.reason = code, ""
        if code:
            outcome.reason = log_reason.of_attempt(job.directory / LOG, code, child.begin, kills)
        saved = _count(child)
        following = self._following(child)
        reason = {"reason": outcome.reason} if outcome.reason else {}
        self._record(job, {"event": "end", "code": code, "next": following, **reason})
        child.log.close()
        if following == PRUNED:
            outcome.state = PRUNED
            self._record(job, {"event": PRUNED, "step": job.saved_step() or 0})
            self._say(f"pruned   {job.name}  after {lasted:.0f} s")
            return False
        said = f"after {lasted:.0f} s: {exit_codes.explained(code)}"
        if outcome.idle:
            times = f" for {outcome.idle} times" if outcome.idle > 1 else ""
            said += f", nothing new was saved{times}"
        elif saved is not None:
            said += f", saved at step {saved:,}"
        if following == "stopped":
            outcome.state = following
            self._say(f"stopped  {job.name}  {said}")
            return False
        if following == "restart":
            outcome.delay(lasted)
        elif following == "retry":
            said += f", {outcome.crashes} of {self._retries} retries"
        else:
            outcome.state = following
            said = (
                f"after {lasted:.0f} s"
                if code == ExitCode.DONE
                else f"{said}; see {job.directory / LOG}"
            )
        if following not in ("restart", "retry"):
            alike = self._refusals if outcome.reason in self._refusals else []
            self._refusals = [*alike, outcome.reason] if code == ExitCode.WRONG else []
        below = f"\n         {outcome.reason}" if outcome.reason else ""
        self._say(f"{following:<8} {job.name}  {said}{below}")
        return following in ("restart", "retry")

    def _following(self, child: "_Child") -> str:
        """Returns `PRUNED`, "stopped", or as `exit_codes.what_next`, for a child that has ended."""
        code = child.process.returncode
        if child.pruned and code in (ExitCode.PREEMPTED, -signal.SIGTERM):
            return PRUNED
        if self._stops and code not in (ExitCode.DONE, *FINAL):
            return "stopped"
        if child.outcome.idle >= MOST_IDLE:
            return "failed"
        return exit_codes.what_next(code, child.outcome.crashes, self._retries)

    def _record(self, job: Job, line: Mapping[str, Any]) -> None:
        """Appends an event to ``attempts.jsonl``, which `status` reads; an OSError is a line."""
        try:
            with open(job.directory / ATTEMPTS, "a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                end = b"" if file.read(1) in (b"", b"\n") else b"\n"  # of a torn line
                text = json.dumps({**line, "time": round(time.time(), 3)})
                file.write(end + text.encode() + b"\n")
        except OSError as error:
            self._say(f"not kept {job.name}: {job.directory / ATTEMPTS}: {error.strerror}")

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
    begin: int  # of this attempt in the log, in bytes
    kills: int  # `log_reason.memory_kills` at the start
    saved: int | None  # the newest saved step at the start
    looked: float = 0.0  # when its source was called last
    pruned: bool = False  # whether its source has given it up


def _next_ready(waiting: deque[Job], outcomes: Mapping[str, JobResult]) -> Job | None:
    """Removes and returns the first job that may start now; None if there is none."""
    for job in waiting:
        if outcomes[job.name].ready <= time.monotonic():
            waiting.remove(job)
            return job
    return None


def _count(child: _Child) -> int | None:
    """Counts crashes, and preempted attempts that saved nothing; returns the step that is saved.

    The step is None, and not looked up, for an attempt that was not preempted.
    """
    code, job, outcome = child.process.returncode, child.job, child.outcome
    outcome.crashes += code not in (ExitCode.DONE, ExitCode.PREEMPTED)
    if code != ExitCode.PREEMPTED:
        outcome.idle = 0
        return None
    saved = job.saved_step()
    idle = job.saved is not None and saved == child.saved
    outcome.idle = outcome.idle + 1 if idle else 0
    return saved


def _over(job: Job, outcome: JobResult, began: float) -> bool:
    """Returns whether a job whose lock is free needs no start; sets its state.

    It may have finished since it was looked at, and a launcher that ran it meanwhile, since `began`
    (seconds since 1970), may have seen it end for good.
    """
    if job.finished():
        outcome.state, outcome.code = "done", int(ExitCode.DONE)
        return True
    last = (events(job.directory / ATTEMPTS) or [{}])[-1]
    if last.get("event") == PRUNED:
        outcome.state = PRUNED
        return True
    meanwhile = outcome.attempts == 0 and last.get("time", 0.0) >= began
    if outcome.state != "busy" and not meanwhile:
        return False
    code = last.get("code") if last.get("event") == "end" else None
    if code == ExitCode.DONE and job.saved is None:
        outcome.state, outcome.code = "done", code
    elif code in FINAL:
        outcome.state, outcome.code = "failed", code
        outcome.reason = last.get("reason") or exit_codes.explained(code)
    else:
        return False
    return True


def folder(run: Description, backend: str) -> pathlib.Path:
    """Returns the folder of a run's ``log.txt`` and attempts: its workdir, if that is on a disk.

    For a workdir in a bucket it is a folder below ``runs`` in the current directory.
    """
    if not is_remote(run.workdir):
        return pathlib.Path(run.workdir)
    return pathlib.Path("runs", backend, run.cloud_name).absolute()


def progress(run: Description) -> tuple[Callable[[], int | None], int]:
    """Returns the function that looks up the newest saved step of a run, and its steps."""

    def saved() -> int | None:
        from localglobal_jax.launch import status  # noqa: PLC0415 # imports jax

        found = status.latest_step(run.workdir)
        stopped_early = found and status.steps_of(run.run, run.workdir, found) == found
        return run.run.steps if stopped_early else found

    return saved, run.run.steps


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    retries: int | None,
    environment: Mapping[str, str],
    say: Say,
    *,
    done: int = 0,
    source: Source | None = None,
    ended: Callable[[Job, JobResult], Any] = lambda job, outcome: None,
) -> Started:
    """Runs all jobs in a pool; returns their outcomes and the exit code of the whole.

    `done`: the runs of the sweep that had finished before and are not among `jobs`. `source` and
    `ended`: see `Pool.run`.
    """
    pool = Pool(slots, DEFAULT_RETRIES if retries is None else retries, environment, say)
    outcomes = pool.run(jobs, source, ended)
    states = source.states() if source else [o.state for o in outcomes.values()] + ["done"] * done
    counts = f"{states.count('done')} of {len(states)} done, {states.count('failed')} failed"
    say(counts + (f", {states.count(PRUNED)} pruned" if PRUNED in states else ""))
    if pool.refused and (source or not LEFT.isdisjoint(states)):
        say(
            f"{ALIKE} runs in a row were refused for the same reason, so no other was started. "
            "Mend it; the same command goes on"
        )
    code = ExitCode.FAILED if "failed" in states else ExitCode.DONE
    if pool.stopped:
        code = ExitCode.PREEMPTED
        say("stopped: the same command goes on from what is saved")
    return Started(code, {k: vars(v) for k, v in outcomes.items()})


def events(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events of an ``attempts.jsonl``, without damaged lines; [] without the file."""
    found = []
    lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    for text in lines:
        with contextlib.suppress(ValueError):  # torn
            line = json.loads(text)
            if isinstance(line, dict):
                found.append(line)
    return found


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
