# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir, with real processes; and files that are there whole or not."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from localglobal_jax.checkpoints import workdir
from localglobal_jax.config import validation

HOLD = """
import pathlib, sys, time
from localglobal_jax.checkpoints import workdir
with workdir.Lock() as lock:
    lock.take(pathlib.Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`/run."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def take(file):
    with workdir.Lock() as lock:
        lock.take(file)
        return json.loads(file.read_text())


def test_the_other_run_is_named(holder, tmp_path):
    file = tmp_path / "run" / ".lock"
    for _ in range(2):  # who was refused has not broken it
        with pytest.raises(workdir.Locked) as error:
            take(file)
        assert f"pid {holder.pid} on {socket.gethostname()}, since 20" in str(error.value)
        assert str(file) in str(error.value)


def test_a_killed_run_locks_nothing(holder, tmp_path):
    file = tmp_path / "run" / ".lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert file.exists()
    assert take(file)["pid"] == os.getpid()
    assert not file.exists()


def test_a_run_that_ends_leaves_no_file(holder, tmp_path):
    holder.communicate()
    assert holder.returncode == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_that_its_owner_removes_meanwhile_is_not_believed(tmp_path, monkeypatch):
    """Locked, but the directory has another file of that name by now: both would hold one."""
    file, real, calls = tmp_path / ".lock", workdir.fcntl.flock, []

    def flock(handle, how):
        real(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()
            file.touch()

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    with workdir.Lock() as lock:
        lock.take(file)
        assert len(calls) == 2
        with pytest.raises(workdir.Locked, match=f"pid {os.getpid()}"):
            take(file)


def test_where_there_are_no_locks_it_warns(tmp_path, monkeypatch, caplog):
    def flock(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    assert take(tmp_path / ".lock")["pid"] == os.getpid()
    assert "cannot be locked" in caplog.text


def test_a_checkpoint_from_before_an_option_existed_is_no_other_config(tmp_path):
    run = validation.check({"model": {"name": "coatnet_0"}})
    workdir.reserve(run, tmp_path)
    saved = run.model_dump(mode="json")
    del saved["optim"]["skip_nonfinite"], saved["log"]
    workdir.check_config(tmp_path, 3, {"config": saved})
    workdir.check_config(tmp_path, 3, {})  # converted weights have none
    saved["optim"]["learning_rate"] = 0.5
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0\.5 .* 0\.001"):
        workdir.check_config(tmp_path, 3, {"config": saved})


@pytest.mark.parametrize("classes", [3, 20, 21, 22])
def test_an_error_shows_twenty_classes_and_counts_the_others(classes):
    labels = [f"label{n}" for n in range(classes)]
    with pytest.raises(ValueError, match="label0, label1, label2") as raised:
        workdir.check_labels(labels, {"labels": ["another"]})
    shown = str(raised.value).split(";", maxsplit=1)[0].split()
    assert sum(word.startswith("label") for word in shown) == min(classes, 20)
    assert [word for word in shown if word.isdigit()] == [str(classes - 20)] * (classes > 20)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ENOSPC, "No space left on device", "other"), False),
        (OSError("of a library"), False),
        (PermissionError(errno.EACCES, "denied"), False),  # has a class, and its own message
    ],
)
def test_an_error_of_the_system_without_a_file_gets_the_name_of_the_workdir(error, named, tmp_path):
    with pytest.raises(OSError) as found, workdir.named_in_errors(tmp_path):
        raise error
    assert (found.value is error) != named
    assert (found.value.filename == str(tmp_path)) == named
    assert found.value.errno == error.errno


def test_a_file_is_replaced_whole_and_a_link_stays(tmp_path):
    shared, link = tmp_path / "shared" / "a.csv", tmp_path / "a.csv"
    shared.parent.mkdir()
    shared.write_text("old")
    link.symlink_to("shared/a.csv")
    with shared.open() as reader:
        workdir.write_atomically(link, "new")
        assert reader.read() == "old"
    assert link.is_symlink() and shared.read_text() == "new"
    assert [file.name for file in shared.parent.iterdir()] == ["a.csv"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    workdir.write_atomically(pipe, "new")
    thread.join(60)
    assert read == [b"new"] and pipe.is_fifo()


def test_many_may_write_one_file(tmp_path):
    def write(text):
        for _ in range(20):
            workdir.write_atomically(tmp_path / "a", text * 1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, "abcdef"))  # no error
    found = (tmp_path / "a").read_text()
    assert found == found[0] * 1000 and len(list(tmp_path.iterdir())) == 1


def test_a_path_that_is_not_utf8_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="not UTF-8"):
        workdir.refuse_other(None, tmp_path / "caf\udce9")
