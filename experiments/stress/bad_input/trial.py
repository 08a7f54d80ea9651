# SPDX-License-Identifier: Apache-2.0
"""Runs one attempt in a process of its own, with limits of time and memory."""

import dataclasses
import json
import os
import pathlib
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

SECONDS = 20
GROWTH = 1200  # MB beyond what the process had before; more is a blow-up
SPACE = 8 * 2**30  # bytes of address space beyond it: so that a blow-up does not take the machine


@dataclasses.dataclass
class Outcome:
    """Outcome of an attempt. ``kind``: the function's result, or refused, error, crash, hang."""

    kind: str
    message: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0  # growth of the peak of resident memory

    @property
    def good(self) -> bool:
        return self.kind not in ("error", "crash", "hang") and self.megabytes < GROWTH


def attempt(function: Callable[[], str], seconds: float = SECONDS) -> Outcome:
    """Calls `function` in a fork. A ValueError is refused; any other exception is an error."""
    out, into = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(out)
        _child(function, into)
    os.close(into)
    data, deadline = b"", started + seconds
    with os.fdopen(out, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (part := pipe.read(65536)):
                break
            data += part
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - started
    if data:
        return Outcome(**json.loads(data), seconds=took)
    if took >= seconds:
        return Outcome("hang", f"no answer in {seconds} s", took)
    return Outcome("crash", f"wait status {status}", took)


def _child(function: Callable[[], str], into: int) -> None:
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
    with tempfile.TemporaryFile() as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = {"kind": function(), "message": ""}
    except ValueError as error:
        found = {"kind": "refused", "message": str(error)}
    except BaseException as error:  # the point of it all
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{os.path.basename(where.filename)}:{where.lineno}"
        found = {"kind": "error", "message": f"{type(error).__name__} at {at}: {error}"}
    sys.stderr.flush()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer = json.dumps({**found, "megabytes": growth}).encode()
    while answer:
        answer = answer[os.write(into, answer) :]
    os._exit(0)
