# SPDX-License-Identifier: Apache-2.0
"""Measures the time from the command to the first step of the digits config; writes startup.csv.

    python experiments/benchmarks/startup.py

Cold: no compiled program is kept; warm: in a cache of programs (``parallel.compilation_cache``).
A last start counts the compiled programs: the same program twice would be a mistake.
"""

import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pairs

HERE = pathlib.Path(__file__).parent
ROUNDS, GOAL = 5, 10.0  # seconds, warm
FIRST = re.compile(r"step +1/")


def start(folder, cache, environment=None):
    """Returns the seconds until the first step is reported, and the output until then."""
    command = [
        *(sys.executable, "-m", "localglobal_jax", "train"),
        f"--config={HERE.parents[1] / 'configs' / 'coatnet_digits.py'}",
        f"--workdir={tempfile.mkdtemp(dir=folder)}",
        "--config.log.every=1",
        *([f"--config.parallel.compilation_cache={cache}"] if cache else []),
    ]
    began, lines = time.perf_counter(), []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            lines.append(line)
            if FIRST.match(line):
                break
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGKILL)
    if not lines or not FIRST.match(lines[-1]):
        raise RuntimeError("".join(lines))
    return seconds, lines


def main():
    with tempfile.TemporaryDirectory() as folder:
        cache = f"{folder}/programs"
        start(folder, cache)  # fills it
        seconds = np.array(
            [[start(folder, None)[0], start(folder, cache)[0]] for _ in range(ROUNDS)]
        )
        _, lines = start(folder, None, {"JAX_LOG_COMPILES": "1"})
    # jax prints the message too, behind a date
    programs = [line for line in lines if line.startswith("Compiling ")]
    twice = [name for name, n in collections.Counter(programs).items() if n > 1]
    for i, name in enumerate(("cold", "warm")):
        row = {
            "name": name,
            "goal": GOAL if name == "warm" else "",
            **{f"seconds_{k}": v for k, v in pairs.spread(seconds[:, i]).items()},
            "programs": len(programs),
            "programs_compiled_twice": len(twice),
            "load": round(os.getloadavg()[0], 1),
            **pairs.environment(),
        }
        pairs.write(HERE / "startup.csv", [row])
        print(row)
    print("\n".join(twice))


if __name__ == "__main__":
    main()
