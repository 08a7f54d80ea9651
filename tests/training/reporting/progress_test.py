# SPDX-License-Identifier: Apache-2.0
"""The progress line, on a terminal and in a pipe, and the parameter table."""

import io
import math

import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.training.reporting.progress import (
    Progress,
    parameter_table,
    progress_line,
)


@pytest.mark.parametrize(
    ("given_", "line"),
    [
        (
            {"step": 350, "loss": 0.12344, "rate": 5234.4, "seconds": 65.2, "waiting": 0.031},
            "step  350/1000  loss 0.1234  5,234 items/s  ETA 1:05  input wait 3 %",
        ),
        (
            {"step": 1000, "loss": None, "rate": 0.25, "seconds": 0, "waiting": 1, "mfu": 0.412},
            "step 1000/1000  0.25 items/s  ETA 0:00  input wait 100 %  MFU 41 %",
        ),
        (
            {"step": 1, "loss": math.nan, "rate": 12, "seconds": 3599.7, "waiting": 0},
            "step    1/1000  loss nan  12 items/s  ETA 1:00:00  input wait 0 %",
        ),
        (
            {"step": 0, "loss": 1, "rate": math.inf, "seconds": math.inf, "waiting": math.nan},
            "step    0/1000  loss 1.0000",
        ),
    ],
)
def test_progress_line(given_, line):
    given_ = dict(given_)
    assert progress_line(given_.pop("step"), 1000, **given_) == line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_plain_lines():
    pipe = io.StringIO()
    progress = Progress(pipe)
    progress.show("step 1")
    progress.print("test: 1.0")
    progress.show("step 2")
    progress.close()
    assert pipe.getvalue().splitlines() == ["step 1", "test: 1.0", "step 2"]


def test_a_terminal_gets_one_line_redrawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    progress = Progress(terminal)
    progress.show("step 1/9 and so on, for longer than the terminal is wide")
    progress.show("step 2/9")
    assert "\n" not in terminal.getvalue()
    assert all(len(x) < 30 for x in terminal.getvalue().replace("\x1b[K", "").split("\r"))
    progress.print("saved")
    progress.show("step 3/9")
    progress.close()
    progress.close()
    lines = terminal.getvalue().split("\n")
    assert lines[0].endswith("\r\x1b[Ksaved")
    assert lines[1].startswith("\rstep 3/9")
    assert lines[2:] == [""]


def test_parameter_table_adds_up():
    params = {"stem": {"kernel": np.zeros((3, 3, 1, 16))}, "head": {"bias": np.zeros(1000)}}
    table = parameter_table(params).splitlines()
    assert table[0].split() == ["head/bias", "(1000,)", "1,000"]
    assert table[1].split() == ["stem/kernel", "(3,", "3,", "1,", "16)", "144"]
    assert table[-1].split() == ["total", "2", "arrays", "1,144"]
    assert len({len(line) for line in table}) == 1


def test_a_large_table_is_grouped():
    block = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    params = {f"stage{s}": {f"block{b}": block for b in range(10)} for s in range(3)}
    table = parameter_table(params).splitlines()
    assert len(table) == 32
    assert table[0].split() == ["stage0/block0", "2", "arrays", "9"]
    assert table[-1].split() == ["total", "60", "arrays", "270"]
