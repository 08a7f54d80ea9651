# SPDX-License-Identifier: Apache-2.0
"""Slots and processes, with children of milliseconds: real ones, that crash, save and stop."""

import dataclasses
import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localglobal_jax.launch import exit_codes, local, pool


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_slots_share_no_gpu_and_leave_no_core_behind(count, cores, gpus):
    names = [f"g{i}" for i in range(gpus)]
    if 0 < gpus < count:
        with pytest.raises(ValueError, match="--slots"):
            local.slots(count, range(cores), names)
        names = []
    slots = local.slots(count, range(cores), names)
    assert len(slots) == count
    used = [gpu for slot in slots for gpu in slot.gpus or ()]
    assert len(used) == len(set(used)) == len(names) // count * count
    assert len({len(slot.gpus or ()) for slot in slots}) == 1
    assert all((slot.gpus is None) == (not names) for slot in slots)
    for slot in slots:
        assert len(set(slot.cores)) == len(slot.cores) == max(1, cores // count)
    if count <= cores:
        every = [core for slot in slots for core in slot.cores]
        assert len(every) == len(set(every))


def test_visible_gpus():
    files = ["nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"]
    assert local.visible_gpus({}, files) == ["2", "10"]
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-a"}, files) == ["3", "GPU-a"]
    for hidden in ("", "-1", " ", "-1,0", "NoDevFiles"):
        known = ["NoDevFiles"] if hidden == "NoDevFiles" else []  # a name is CUDA's to judge
        assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": hidden}, files) == known
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": "1, 2,-1,3"}, files) == ["1", "2"]
    assert pool.Slot(gpus=("3", "4")).environment() == {"CUDA_VISIBLE_DEVICES": "3,4"}


def test_a_slot_without_gpus_sees_none():
    own = {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda"}
    for slot in local.slots(2, range(2), ["0"], gpus_per_slot=0):
        assert {**own, **slot.environment()} == {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    for slot in local.slots(2, range(2), [], gpus_per_slot=0):  # a TPU, or a GPU of another maker
        assert slot.environment() == {}


@pytest.mark.parametrize(
    ("code", "crashes", "expected"),
    [
        *((0, 0, "done"), (42, 0, "restart"), (42, 5, "restart")),
        *((2, 1, "failed"), (3, 1, "failed")),
        *(
            (1, 1, "retry"),
            (-9, 2, "retry"),
            (137, 2, "retry"),
            (-9, 3, "failed"),
            (1, 3, "failed"),
        ),
    ],
)
def test_what_next(code, crashes, expected):
    assert exit_codes.what_next(code, crashes, retries=2) == expected


COUNT = "n = 1 + len(list(pathlib.Path().glob('start*'))); pathlib.Path(f'start{n}').touch()"


def job(folder, name, code):
    """A child that knows, as `n`, how often it was started."""
    lines = ["import os, pathlib, signal, sys, time", "os.chdir(sys.argv[1])", COUNT, code]
    directory = folder / name
    return pool.Job(name, (sys.executable, "-c", "\n".join(lines), str(directory)), directory)


def events(found):
    return [
        json.loads(line) for line in (found.directory / "attempts.jsonl").read_text().splitlines()
    ]


def test_crashes_are_retried_saves_restarted_mistakes_not(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "SHORT", 0.0)  # no pauses
    jobs = [
        job(tmp_path, "good", "print('hello')"),
        job(tmp_path, "crashes-once", "if n < 2: os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, "crashes", "sys.exit(1)"),
        job(tmp_path, "saves", "sys.exit(42 if n < 5 else 0)"),
        job(tmp_path, "wrong", "print('no such data\\n'); sys.exit(2)"),
        job(tmp_path, "diverges", "sys.exit(3)"),
    ]
    said = []
    outcomes = pool.Pool([pool.Slot()] * 2, retries=2, say=said.append).run(jobs)
    found = {name: (o.state, o.code, o.attempts) for name, o in outcomes.items()}
    assert found == {
        "good": ("done", 0, 1),
        "crashes-once": ("done", 0, 2),
        "crashes": ("failed", 1, 3),
        "saves": ("done", 0, 5),
        "wrong": ("failed", 2, 1),
        "diverges": ("failed", 3, 1),
    }
    assert (tmp_path / "good" / "log.txt").read_text() == "hello\n"

    def ends(found):
        return [(e["code"], e["next"]) for e in events(found) if e["event"] == "end"]

    assert ends(jobs[1]) == [(-9, "retry"), (0, "done")]
    assert ends(jobs[2]) == [(1, "retry"), (1, "retry"), (1, "failed")]
    assert ends(jobs[3]) == [(42, "restart")] * 4 + [(0, "done")]
    assert ends(jobs[4]) == [(2, "failed")]
    assert any("killed by SIGKILL" in line for line in said)
    assert any("(wrong config or input)" in line and "no such data" in line for line in said)


@pytest.mark.parametrize(
    ("ends", "started"),
    [
        ("aaaaa", 3),  # such as a data set that nobody has prepared
        ("aabaaa", 6),
        ("aa.aaaa", 6),
        ("ababab", 6),
        (".aaaa", 4),
    ],
)
def test_no_other_run_is_started_after_three_that_were_refused_alike(ends, started, tmp_path):
    codes = {end: f"print('localglobal train: no data {end}'); sys.exit(2)" for end in "ab"}
    jobs = [job(tmp_path, f"j{i}", codes.get(end, "")) for i, end in enumerate(ends)]
    said = []
    found = pool.run_jobs(jobs, [pool.Slot()], 2, None, said.append)
    assert found.code == exit_codes.ExitCode.FAILED
    states = [outcome["state"] for outcome in found.runs.values()]
    left = len(ends) - started
    assert states.count("not started") == left
    assert states[:started] == ["done" if end == "." else "failed" for end in ends[:started]]
    assert any("no other was started" in line for line in said) == (left > 0)


class Refused:
    """A source of runs that are all refused for one reason."""

    def __init__(self, folder):
        self.folder, self.outcomes = folder, []

    def next_job(self):
        name = f"j{len(self.outcomes)}"
        return job(self.folder, name, "print('localglobal train: no data'); sys.exit(2)")

    def gives_up(self, job):
        return False

    def ended(self, job, outcome):
        self.outcomes.append(outcome.state)

    def states(self):
        return self.outcomes


def test_no_other_run_is_drawn_after_three_that_were_refused_alike(tmp_path):
    said, source = [], Refused(tmp_path)
    found = pool.run_jobs(
        [], [pool.Slot()], 2, None, said.append, source=source, ended=source.ended
    )
    assert found.code == exit_codes.ExitCode.FAILED
    assert source.outcomes == ["failed"] * 3
    assert any("no other was started" in line for line in said)


def test_no_more_at_a_time_than_slots_each_in_its_own(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    slots = [pool.Slot(cores=(core,), gpus=(f"g{i}",)) for i, core in enumerate(cores[:2])]
    code = (
        "print(*os.sched_getaffinity(0), os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "begin = time.time(); time.sleep(0.3); print(begin, time.time())"
    )
    jobs = [job(tmp_path, f"j{i}", code) for i in range(4)]
    pool.Pool(slots, retries=0, say=lambda line: None).run(jobs)
    assert sorted(os.sched_getaffinity(0)) == cores
    logs = [(tmp_path / f"j{i}" / "log.txt").read_text().split() for i in range(4)]
    allowed = {(str(slot.cores[0]), slot.gpus[0]) for slot in slots}
    assert {(core, gpu) for core, gpu, *_ in logs} <= allowed
    for (core_a, _, *a), (core_b, _, *b) in itertools.combinations(logs, 2):
        overlap = float(a[0]) < float(b[1]) and float(b[0]) < float(a[1])
        assert not (overlap and core_a == core_b)


LAUNCHER = """
import pathlib, sys
from localglobal_jax.launch import pool
jobs = [pool.Job(name, command, pathlib.Path(path)) for name, command, path in JOBS]
print(pool.run_jobs(jobs, [pool.Slot()] * SLOTS, RETRIES, None, print).code)
"""


def launcher(jobs, slots=1, retries=0, before="", **options):
    """A pool in a process of its own, which executes the line `before` first."""
    parts = [(found.name, found.command, str(found.directory)) for found in jobs]
    text = LAUNCHER.replace("JOBS", repr(parts)).replace("SLOTS", str(slots))
    text = f"{before}\n{text}".replace("RETRIES", str(retries))
    words = [sys.executable, "-c", text]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options)


def orphan(found):
    """Starts a job whose launcher is then killed; returns the pid of the job, which runs on."""
    process = launcher([found])
    wait_for(found.directory / "ready")
    wait_for(found.directory / "attempts.jsonl", pool.events)  # a start is recorded after it
    process.kill()
    process.communicate()
    assert pool.is_locked(found.directory)
    return events(found)[0]["pid"]


def test_a_job_of_a_killed_launcher_is_waited_for_and_counted(tmp_path):
    code = """
        open('ready', 'w')
        while not os.path.exists('seen'):
            time.sleep(0.01)
        open('saved', 'w')
    """
    first = job(tmp_path, "j", textwrap.dedent(code))
    orphan(first)
    steps = {True: 5, False: None}
    again = dataclasses.replace(
        first, saved=lambda: steps[(tmp_path / "j/saved").exists()], steps=5
    )
    said = []

    def say(line):
        said.append(line)
        if line.startswith("start"):
            (tmp_path / "j/seen").touch()

    started = pool.run_jobs([again, job(tmp_path, "k", "")], [pool.Slot()], 0, {}, say)
    assert (started.code, started.runs["j"]["state"]) == (0, "done")
    assert started.runs["j"]["attempts"] == 0 and said[-1] == "2 of 2 done, 0 failed"
    # the slot is not kept waiting
    assert [line.split()[:2] for line in said[:2]] == [["busy", "j:"], ["start", "k"]]
    assert len(list((tmp_path / "j").glob("start*"))) == 1  # nothing runs twice in one folder


def test_a_busy_job_that_dies_is_taken_over(tmp_path):
    first = job(tmp_path, "j", "open('ready', 'w')\nif n == 1: time.sleep(600)")
    pid = orphan(first)
    said = []

    def kill_once_busy(line):
        said.append(line)
        if line.startswith("busy"):
            os.kill(pid, signal.SIGKILL)

    started = pool.run_jobs([first], [pool.Slot()], 0, {}, kill_once_busy)
    assert (started.code, started.runs["j"]["state"]) == (0, "done")
    assert "taken over" in said[1] and said[-1] == "1 of 1 done, 0 failed"


def test_two_starters_share_the_jobs_and_both_count_all(tmp_path):
    jobs = [job(tmp_path, f"j{i}", "time.sleep(0.5)") for i in range(4)]
    jobs.append(job(tmp_path, "wrong", "time.sleep(0.2); print('no such data'); sys.exit(2)"))
    both = [launcher(jobs), launcher(jobs)]
    ends = [process.communicate(timeout=600)[0].splitlines() for process in both]
    for said in ends:
        assert said[-2:] == ["4 of 5 done, 1 failed", "1"]
        assert "no such data" in "\n".join(said)
    starts = [len(list((tmp_path / found.name).glob("start*"))) for found in jobs]
    assert starts == [1] * 5


def test_a_stop_ends_the_waiting_for_a_busy_job(tmp_path):
    first = job(tmp_path, "j", "open('ready', 'w'); time.sleep(600)")
    pid = orphan(first)
    try:
        second = launcher([first], stderr=subprocess.PIPE)
        assert second.stdout.readline().startswith("busy")
        second.send_signal(signal.SIGTERM)
        said = second.communicate(timeout=600)[0].splitlines()
        assert said[-1] == "42" and "same command" in said[-2]
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_job_that_finished_meanwhile_is_not_started(tmp_path):
    done = dataclasses.replace(job(tmp_path, "j", ""), saved=lambda: 5, steps=5)
    assert pool.Pool([pool.Slot()], 0, say=lambda line: None).run([done])["j"].state == "done"
    assert not list((tmp_path / "j").glob("start*"))


def test_a_run_that_never_saves_is_not_restarted_for_ever(tmp_path, monkeypatch):
    """Such as one whose other hosts do not turn up; as long as it saves, it goes on."""
    monkeypatch.setattr(pool, "SHORT", 0.0)
    monkeypatch.setattr(pool, "MOST_IDLE", 3)
    stopped = "print('host 1 of 2 did not turn up'); sys.exit(42)"
    never = dataclasses.replace(job(tmp_path, "never", stopped), saved=lambda: None, steps=9)
    count = lambda: len(list((tmp_path / "goes-on").glob("start*")))  # noqa: E731
    saves = dataclasses.replace(
        job(tmp_path, "goes-on", "sys.exit(42 if n < 9 else 0)"), saved=count, steps=99
    )
    said = []
    outcomes = pool.Pool([pool.Slot()] * 2, 0, say=said.append).run([never, saves])
    assert (outcomes["never"].state, outcomes["never"].attempts) == ("failed", 3)
    assert (outcomes["goes-on"].state, outcomes["goes-on"].attempts) == ("done", 9)
    lines = [line for line in said if "never" in line and "start" not in line.split()]
    assert all("nothing new was saved" in line and "did not turn up" in line for line in lines)
    assert any("saved at step 3" in line for line in said)


def test_the_reason_of_a_failure_is_that_of_its_own_attempt(tmp_path):
    code = "if n == 1: raise ValueError('first')\nos.kill(os.getpid(), signal.SIGKILL)"
    said = []
    outcomes = pool.Pool([pool.Slot()], 1, say=said.append).run([job(tmp_path, "j", code)])
    assert outcomes["j"].state == "failed"
    assert "ValueError: first" in said[1] and "ValueError" not in said[-1]
    assert "killed by SIGKILL" in said[-1] and "dmesg" in said[-1]
    ends = [event for event in events(job(tmp_path, "j", "")) if event["event"] == "end"]
    assert ends[0]["reason"] == "ValueError: first" and "memory" in ends[1]["reason"]


def test_a_torn_event_spoils_no_other(tmp_path):
    """As of a full disk: the next event is a line of its own."""
    found = job(tmp_path, "j", "")
    found.directory.mkdir()
    (found.directory / "attempts.jsonl").write_text('{"event": "start"}\n{"event": "en')
    pool.Pool([pool.Slot()], 0, say=lambda line: None).run([found])
    kept = pool.events(found.directory / "attempts.jsonl")
    assert [event["event"] for event in kept] == ["start", "start", "end"]


def test_a_full_disk_ends_no_other_job(tmp_path):
    """The events of one job cannot be written (EFBIG), and another's folder cannot be made."""
    full, other = job(tmp_path, "full", ""), job(tmp_path, "other", "time.sleep(0.3)")
    full.directory.mkdir()
    (full.directory / "attempts.jsonl").write_text("\n" * 5000)
    (tmp_path / "blocked").touch()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    process = launcher([full, job(tmp_path, "blocked", ""), other], slots=3, before=limit)
    text = process.communicate(timeout=600)[0]
    assert text.splitlines()[-2:] == ["2 of 3 done, 1 failed", "1"], text
    assert os.strerror(errno.EFBIG) in text and f"{tmp_path / 'blocked'}" in text


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_stop_requests_go_to_the_children_and_no_other_starts(asked, tmp_path):
    saves = (
        "def save(*_): open('saved', 'w'); sys.exit(42)\n"
        "signal.signal(signal.SIGTERM, save); open('ready', 'w')\n"
        "while True: time.sleep(0.01)"
    )
    jobs = [job(tmp_path, name, saves) for name in ("a", "b", "later")]
    process = launcher(jobs, slots=2, retries=5, start_new_session=True)
    for name in ("a", "b"):
        wait_for(tmp_path / name / "ready")
    process.send_signal(asked)
    output, _ = process.communicate(timeout=600)
    said = output.splitlines()
    assert sorted(line.split()[:2] for line in said[2:4]) == [["stopped", "a"], ["stopped", "b"]]
    assert said[-1] == "42" and "same command" in said[-2]
    assert (tmp_path / "a" / "saved").exists() and (tmp_path / "b" / "saved").exists()
    assert not (tmp_path / "later").exists()


def wait_for(path, condition=pathlib.Path.exists):
    for _ in range(3000):
        if condition(path):
            return
        time.sleep(0.02)
    raise AssertionError(path)


def test_a_job_that_waits_for_its_restart_is_stopped_with_the_pool(tmp_path):
    said = []

    def say(line):
        said.append(line)
        if line.startswith("restart") and len(said) > 3:  # the second: the next start is delayed
            signal.raise_signal(signal.SIGTERM)

    found = pool.run_jobs([job(tmp_path, "saves", "sys.exit(42)")], [pool.Slot()], 2, None, say)
    assert found.code == exit_codes.ExitCode.PREEMPTED
    assert found.runs["saves"]["state"] == "stopped"


def test_a_job_that_waits_while_others_are_refused_is_named(tmp_path):
    refused = "print('localglobal train: no data'); sys.exit(2)"
    jobs = [job(tmp_path, "saves", "sys.exit(42)")]
    jobs += [job(tmp_path, f"w{i}", refused) for i in range(pool.ALIKE)]
    said = []
    found = pool.run_jobs(jobs, [pool.Slot()], 2, None, said.append)
    assert found.runs["saves"]["state"] == "stopped"
    assert any("no other was started" in line for line in said)


def test_a_pool_that_fails_lets_its_children_save(tmp_path):
    save = "lambda *_: (open('saved', 'w').close(), os._exit(42))"
    code = f"signal.signal(signal.SIGTERM, {save}); open('ready', 'w').close(); time.sleep(60)"
    child = job(tmp_path, "child", code)

    class Full:
        def next_job(self):
            return None if child.directory.exists() else child

        def gives_up(self, job):
            if (job.directory / "ready").exists():
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        pool.Pool([pool.Slot()], 0, say=lambda line: None).run([], Full())
    assert (child.directory / "saved").exists()
    assert events(child)[-1]["code"] == 42 and events(child)[-1]["next"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGKILL, 35])  # one of real time has no name
def test_a_signal_is_explained(number):
    assert "killed by" in exit_codes.explained(-number)
