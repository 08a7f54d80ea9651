# SPDX-License-Identifier: Apache-2.0
"""The reason of a failure: real processes that fail in every way, and the one line shown."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys

import pytest

from localglobal_jax.training.reporting import log_reason

JAX = "import jax, jax.numpy as jnp\n"
# what a process does -> the reason
PROGRAMS = {
    "raise ValueError('the file is empty')": "ValueError: the file is empty",
    "raise ValueError('two\\nlines')": "ValueError: two lines",
    "raise KeyError": "KeyError",
    "try:\n    1 / 0\nexcept Exception as e:\n    raise OSError(5, 'read failed') from e": (
        "OSError: [Errno 5] read failed"
    ),
    "try:\n    1 / 0\nexcept Exception:\n    raise RuntimeError('second')": "RuntimeError: second",
    "e = ValueError('real')\ne.add_note('-' * 20 + '\\nFor simplicity, JAX')\nraise e": (
        "ValueError: real"
    ),
    "raise ExceptionGroup('several', [ValueError('inner')])": (
        "ExceptionGroup: several (1 sub-exception)"
    ),
    "class A:\n    def __del__(self): 1 / 0\na = A()\nraise ValueError('first')": (
        "ValueError: first"
    ),
    "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()\n"
    "raise ValueError('later')": "ValueError: later",
    "print('step 1'); raise MemoryError": "out of memory: MemoryError",
    "import numpy; numpy.ones(2**50)": "out of memory: numpy",
    "import sys; print('localglobal train: no data\\n  see there', file=sys.stderr); sys.exit(2)": (
        "no data see there"
    ),
    "import faulthandler, os; faulthandler.enable(); os.abort()": "Aborted",
    "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)": "Segmentation fault",
    "import os; print('step 1/9', flush=True); os.kill(os.getpid(), 9)": "",
    "print('step 1/9'); raise SystemExit(1)": "",
}


def run(program, **options):
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        **options,
    ).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_reason_of_a_real_failure(program):
    said = run(program)
    found = log_reason.reason(said)
    assert found.startswith(PROGRAMS[program]) and bool(found) == bool(PROGRAMS[program]), said


def test_the_reason_of_an_error_inside_jax():
    said = run(JAX + "jax.jit(lambda x: jnp.ones(3) @ jnp.ones(4))(1.0)")
    assert "JAX has removed its internal frames" in said.splitlines()[-1]
    assert log_reason.reason(said).startswith("TypeError: dot_general requires")


def test_the_reason_under_a_limit_of_memory():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
    said = run(limit + JAX + "print(jnp.ones((2**20, 2**14)) + 1)")
    assert log_reason.reason(said).startswith("out of memory: "), said


NATIVE = """\
step 3/9  loss 1
terminate called after throwing an instance of 'St9bad_alloc'
  what():  std::bad_alloc
Fatal Python error: Aborted

Thread 0x00007f8e1ebff6c0 (most recent call first):
  File "/x/threading.py", line 1 in wait

Extension modules: yaml._yaml, numpy._core._multiarray_umath
"""
CHECK = """\
F0000 00:00:1732812345.678901    4242 pjrt_client.cc:123] Check failed: ok (a vs. b)
*** Check failure stack trace: ***
    @     0x7f00  (unknown)
Fatal Python error: Aborted
"""


def test_the_reason_of_native_code():
    assert log_reason.reason(NATIVE) == "out of memory: std::bad_alloc"
    assert log_reason.reason(CHECK) == "Check failed: ok (a vs. b)"


def test_a_long_message_is_cut():
    found = log_reason.reason(run(f"raise ValueError('x' * 9999 + '\\n' + 'y' * {2**19})"))
    assert len(found) == log_reason.LONGEST and found.endswith("...")


def test_only_the_last_attempt_is_read(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(run("raise ValueError('old')"))
    end = log.stat().st_size
    assert log_reason.of_attempt(log, 1) == "ValueError: old"
    assert log_reason.of_attempt(log, 1, end) == ""
    assert log_reason.of_attempt(log, 1, 10**9) == "ValueError: old"  # the file was replaced
    with log.open("a") as file:
        file.write("no such file\n\n")
    assert log_reason.of_attempt(log, 1, end) == "no such file"
    assert log_reason.of_attempt(log, -15, end) == ""  # a line of progress is not a reason
    assert log_reason.of_attempt(tmp_path / "none", -11) == ""
    assert log_reason.of_attempt(tmp_path, 1).startswith(str(tmp_path))


def test_the_end_of_a_long_log_is_enough(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("step\n" * 2**18 + run("raise ValueError('x')"))
    assert log_reason.of_attempt(log, 1) == "ValueError: x"


def test_a_full_disk(tmp_path):
    """Its log is empty: nothing could be written."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        log = tmp_path / "log.txt"
        with contextlib.suppress(OSError), open(tmp_path / "large", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        log.touch()
        found = log_reason.of_attempt(log, 120)
        assert os.strerror(errno.ENOSPC) in found and str(tmp_path) in found
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_process_that_was_killed():
    assert log_reason.of_signal(-9, 1).startswith("out of memory: ")
    assert "dmesg" in log_reason.of_signal(137, 0)
    assert log_reason.of_signal(1, 1) == "" and log_reason.of_signal(-15, 1) == ""
    assert pathlib.Path("/proc/vmstat").exists() is False or log_reason.memory_kills() >= 0
