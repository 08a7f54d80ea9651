# SPDX-License-Identifier: Apache-2.0
"""Two programs measured in turns: A B A B, each in a process that sleeps while the other works.

A worker is a command that gets ready, prints "ready ABOUT ITSELF", and for every line it reads
does its work and prints "seconds S". Every turn begins with a piece of work that is not measured:
what a process freed before it slept may have gone back to the host of a virtual machine, and
to get it anew slowed our training steps to 1.9 s instead of 1.4.
"""

import csv
import os
import platform
import subprocess
import time
from importlib import metadata

import numpy as np

PAUSE = 0.5  # seconds


class Worker:
    """One side of a comparison."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.about = self._next()

    def _next(self):
        for line in self.process.stdout:
            if line.startswith(("ready ", "seconds ")):
                return line.partition(" ")[2].strip()
        raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")

    def __call__(self):
        """Returns the seconds of one piece of work."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._next())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


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
