# SPDX-License-Identifier: Apache-2.0
"""Slots and processes, with children of milliseconds: real ones, that crash, save and stop."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
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
    used = [gpu for slot in slots for gpu in slot.gpus]
    assert len(used) == len(set(used)) == len(names) // count * count
    assert len({len(slot.gpus) for slot in slots}) == 1
    for slot in slots:
        assert len(set(slot.cores)) == len(slot.cores) == max(1, cores // count)
    if count <= cores:
        every = [core for slot in slots for core in slot.cores]
        assert len(every) == len(set(every))


def test_visible_gpus():
    files = ["nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"]
    assert local.visible_gpus({}, files) == ["2", "10"]
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-a"}, files) == ["3", "GPU-a"]
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, files) == []
    assert pool.Slot(gpus=("3", "4")).environment() == {"CUDA_VISIBLE_DEVICES": "3,4"}


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
    codes = [event["code"] for event in events(jobs[1]) if event["event"] == "end"]
    assert codes == [-9, 0]
    assert any("killed by SIGKILL" in line for line in said)
    assert any("(wrong config or input)" in line and "no such data" in line for line in said)


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


def test_nothing_runs_twice_in_one_folder(tmp_path):
    """Not even if the first launcher was killed and its child lives on."""
    code = "open('ready', 'w'); sys.stdin.read(); time.sleep(600)"
    first = job(tmp_path, "j", code)
    launcher = f"""
from localglobal_jax.launch import pool
import pathlib
job = pool.Job("j", {first.command!r}, pathlib.Path({str(first.directory)!r}))
pool.Pool([pool.Slot()], 0).run([job])
"""
    process = subprocess.Popen([sys.executable, "-c", launcher])
    wait_for(first.directory / "ready")
    process.kill()
    process.wait()
    (start,) = events(first)
    try:
        assert pool.is_locked(first.directory)
        outcomes = pool.Pool([pool.Slot()], 0, say=lambda line: None).run([first])
        assert outcomes["j"].state == "busy" and outcomes["j"].attempts == 0
    finally:
        os.kill(start["pid"], signal.SIGKILL)
    wait_for(first.directory, lambda folder: not pool.is_locked(folder))
    again = job(tmp_path, "j", "pass")
    assert pool.Pool([pool.Slot()], 0, say=lambda line: None).run([again])["j"].state == "done"


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_stop_requests_go_to_the_children_and_no_other_starts(asked, tmp_path):
    saves = (
        "def save(*_): open('saved', 'w'); sys.exit(42)\n"
        "signal.signal(signal.SIGTERM, save); open('ready', 'w')\n"
        "while True: time.sleep(0.01)"
    )
    jobs = [job(tmp_path, name, saves) for name in ("a", "b", "later")]
    parts = [(found.name, found.command, str(found.directory)) for found in jobs]
    launcher = f"""
from localglobal_jax.launch import pool
import pathlib
jobs = [pool.Job(name, command, pathlib.Path(path)) for name, command, path in {parts!r}]
workers = pool.Pool([pool.Slot()] * 2, 5)
outcomes = workers.run(jobs)
print(*(o.state for o in outcomes.values()), workers.stopped, sep=",")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for name in ("a", "b"):
        wait_for(tmp_path / name / "ready")
    process.send_signal(asked)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "stopped,stopped,not started,True"
    assert (tmp_path / "a" / "saved").exists() and (tmp_path / "b" / "saved").exists()
    assert not (tmp_path / "later").exists()


def wait_for(path, condition=pathlib.Path.exists):
    for _ in range(3000):
        if condition(path):
            return
        time.sleep(0.02)
    raise AssertionError(path)
