# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin that writes a JSON line a test: its cases, CPU seconds and the lines that it ran.

Only the first case of a test is run; the others run much the same lines. Only lines of the package
in the test's process are seen. `run.py` starts it. Python's own tracing is enough: frames of other
packages are left at their first event.
"""

import collections
import json
import os
import pathlib
import sys
import threading

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


def function_of(test):
    """Returns the identifier of a test without the case."""
    return test.split("[")[0]


@pytest.hookimpl(trylast=True)  # after the slow ones are left out
def pytest_collection_modifyitems(items):
    """Keeps the first case of each test, unless an earlier, interrupted recording has it."""
    written = set()
    if OUT.exists():
        lines = OUT.read_text(encoding="utf-8").splitlines()
        written = {function_of(json.loads(line)["test"]) for line in lines}
    cases = collections.defaultdict(list)
    for item in items:
        cases[function_of(item.nodeid)].append(item)
    items[:] = [found[0] for function, found in cases.items() if function not in written]
    for item in items:
        item.cases = len(cases[function_of(item.nodeid)])


def cpu_seconds():
    """Returns CPU seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    seen.clear()
    began = cpu_seconds()
    sys.settrace(trace)
    threading.settrace(trace)
    yield
    sys.settrace(None)
    threading.settrace(None)
    lines = collections.defaultdict(list)
    for file, line in sorted(seen.copy()):
        lines[file.removeprefix(PACKAGE)].append(line)
    spent = round(cpu_seconds() - began, 3)
    passed = not getattr(item, "failed", False)
    record = {"test": item.nodeid, "cases": item.cases, "cpu": spent, "passed": passed}
    with OUT.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**record, "lines": lines}) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    item.failed = getattr(item, "failed", False) or not outcome.get_result().passed
