# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin that writes one JSON line a test: its CPU seconds, its result and the lines it ran.

Only lines of the package, in the process of the test; `run.py` starts it. Python's own tracing is
enough: frames of other packages are left at their first event.
"""

import collections
import json
import os
import pathlib
import sys
import threading
import time

import pytest

PACKAGE = str(pathlib.Path("localglobal_jax").resolve()) + os.sep
OUT = pathlib.Path(os.environ["MUTANTS_RECORD"])
seen: set[tuple[str, int]] = set()


def trace(frame, event, arg):
    """Trace function of `sys.settrace`: notes the line if its file is in the package."""
    file = frame.f_code.co_filename
    if not file.startswith(PACKAGE):
        return None
    seen.add((file, frame.f_lineno))
    return trace


def pytest_collection_modifyitems(items):
    """Leaves out the tests that an earlier, interrupted recording wrote."""
    if OUT.exists():
        lines = OUT.read_text(encoding="utf-8").splitlines()
        written = {json.loads(line)["test"] for line in lines}
        items[:] = [item for item in items if item.nodeid not in written]


def cpu_seconds():
    """Returns CPU seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    seen.clear()
    began, clock = cpu_seconds(), time.monotonic()
    sys.settrace(trace)
    threading.settrace(trace)
    yield
    sys.settrace(None)
    threading.settrace(None)
    lines = collections.defaultdict(list)
    for file, line in sorted(set(seen)):
        lines[file.removeprefix(PACKAGE)].append(line)
    spent = round(cpu_seconds() - began, 3), round(time.monotonic() - clock, 3)
    failed = bool(getattr(item, "failed", False))
    record = {"test": item.nodeid, "cpu": spent[0], "wall": spent[1], "failed": failed}
    with OUT.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**record, "lines": lines}) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    item.failed = getattr(item, "failed", False) or not outcome.get_result().passed
