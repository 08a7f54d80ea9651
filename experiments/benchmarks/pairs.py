# SPDX-License-Identifier: Apache-2.0
"""Two programs measured in turns: A B A B, each in a process that sleeps while the other works.

A worker is a command that gets ready, prints "ready ABOUT ITSELF", and for every line it reads
does its work and prints "seconds S". Every turn begins with a piece of work that is not measured:
what a process freed before it slept may have gone back to the host of a virtual machine, and
to get it anew slowed our training steps to 1.9 s instead of 1.4.
"""

import contextlib
import csv
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import numpy as np

PAUSE = 0.5  # seconds
TELLING = r"^[\w.]*(Error|Exception|Interrupt)\b|[Oo]ut of memory|RESOURCE_EXHAUSTED|bad_alloc"


class Failed(RuntimeError):
    """Raised when a worker ends without a result; one line with its reason."""


class Worker:
    """One side of a comparison."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(log := tempfile.TemporaryFile("w+")),  # noqa: SIM115 # closed by `close`
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._log = log
        self.about = self._next()

    def _next(self):
        for line in self.process.stdout:
            if line.startswith(("ready ", "seconds ")):
                return line.partition(" ")[2].strip()
        code = self.process.wait()
        self._log.seek(0)
        said = self._log.read()
        sys.stderr.write(said)
        self.close()
        raise Failed(f"{pathlib.Path(self.process.args[1]).name}: {reason(code, said)}")

    def __call__(self):
        """Returns the seconds of one piece of work."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_next` says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return float(self._next())

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()


def reason(code, said):
    """Returns the line of a worker's output that says why it ended, or else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(TELLING, line)] or lines or ["no output"]
    return f"exit code {code}: {telling[-1][:200]}"


def in_turns(sides, rounds):
    """Returns seconds, [rounds, sides]. Idle threads spin for a while, which would cost the other
    side a core, so each side gets time to become idle first."""
    found = np.zeros((rounds, len(sides)))
    for row in found:
        for i, side in enumerate(sides):
            time.sleep(PAUSE)
            row[i] = side()
    return found


def spread(values):
    """Returns the median and the quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def environment():
    """Returns the versions and the machine that a figure depends on."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": metadata.version("jax"),
    }


def gpu():
    """Returns the name and the driver of the GPU that is used; empty without nvidia-smi."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i"]
    try:
        done = subprocess.run([*command, device], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def write(path, rows):
    """Writes the table; rows of the same name are replaced."""
    old = []
    if path.exists():
        with open(path, newline="") as file:
            old = list(csv.DictReader(file))
    new = {row["name"] for row in rows}
    rows = [row for row in old if row["name"] not in new] + rows
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
