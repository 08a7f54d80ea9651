# SPDX-License-Identifier: Apache-2.0
"""Measures the time from a command to its first step or its answer.

    python experiments/benchmarks/startup.py            # digits to its first step; startup.csv
    python experiments/benchmarks/startup.py answers    # --help, refusals, models; answers.csv

Cold: no compiled program is kept; warm: in a cache of programs (``parallel.compilation_cache``).
A last start counts the compiled programs: the same program twice would be a mistake. Python keeps
its bytecode, as it does where ``PYTHONDONTWRITEBYTECODE`` is not set.
"""

import collections
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pairs

HERE = pathlib.Path(__file__).parent
ROUNDS, GOAL = 5, 3.0  # seconds, warm
FIRST = re.compile(r"step +1/")
MISSING = "a/directory/that/does/not/exist"
WRONG = "--config=coatnet_digits.py:size=huge"
REFUSED = (  # wrong inputs that every command names before it imports jax
    ("train", WRONG, f"--workdir={MISSING}"),
    ("evaluate", f"--workdir={MISSING}"),
    ("prepare", WRONG),
    ("translate", f"--workdir={MISSING}"),
    ("sweep", WRONG, f"--workdir={MISSING}"),
    ("score", MISSING, MISSING),
    ("configs", "nothing.py"),
    ("convert", "nothing", MISSING, f"--out={MISSING}"),
    ("export", MISSING, "--format=safetensors", f"--out={MISSING}"),
    ("plan", WRONG, "--topology=v5e-8"),
    ("bench", WRONG),
    ("inspect", MISSING),
    ("report", MISSING),
)
COMMAND = (sys.executable, "-m", "localglobal_jax")
ANSWERS = {  # name: (commands, exit code, goal in seconds)
    "localglobal --help": ([(*COMMAND, "--help")], 0, 0.4),
    f"a refusal, {len(REFUSED)} commands": ([(*COMMAND, *args) for args in REFUSED], 2, 0.4),
    "classify, no such picture": ([(*COMMAND, "classify", "--workdir=x", MISSING)], 2, 0.4),
    "models, no such model": ([(*COMMAND, "models", "nothing")], 2, 0.4),
    "localglobal models": ([(*COMMAND, "models")], 0, 15.0),
    "import jax": ([(sys.executable, "-c", "import jax")], 0, ""),
    "import localglobal_jax.operators": (
        [(sys.executable, "-c", "import localglobal_jax.operators")],
        *(0, ""),
    ),
}


def environment(**more):
    """Returns the environment of a command, as a user has it."""
    known = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**known, "JAX_PLATFORMS": "cpu", **more}


def start(folder, cache, more=None):
    """Returns the seconds until the first step is reported, and the output until then."""
    command = [
        *(*COMMAND, "train"),
        f"--config={HERE.parents[1] / 'configs' / 'coatnet_digits.py'}",
        f"--workdir={tempfile.mkdtemp(dir=folder)}",
        "--config.log.every=1",
        *([f"--config.parallel.compilation_cache={cache}"] if cache else []),
    ]
    began, lines = time.perf_counter(), []
    found = environment(**(more or {}))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=found) as process:
        for line in process.stderr:
            lines.append(line)
            if FIRST.match(line):
                break
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGKILL)
    if not lines or not FIRST.match(lines[-1]):
        raise RuntimeError("".join(lines))
    return seconds, lines


def answer(command, code):
    """Returns the wall and CPU seconds of a command that ends with `code`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def answers():
    """Measures every row `ROUNDS` times: medians of the rounds, of the slowest command of a row."""
    found = np.zeros((ROUNDS, len(ANSWERS), 2))
    for turn in found:
        for place, (commands, code, _) in zip(turn, ANSWERS.values(), strict=True):
            place[:] = max(answer(command, code) for command in commands)
    rows = [
        {
            "name": name,
            "goal": goal,
            "seconds": round(wall, 2),
            "cpu_seconds": round(cpu, 2),
            "load": round(os.getloadavg()[0], 1),
            **pairs.environment(),
        }
        for (name, (*_, goal)), (wall, cpu) in zip(
            ANSWERS.items(), np.median(found, 0), strict=True
        )
    ]
    pairs.write(HERE / "answers.csv", rows)
    print(*rows, sep="\n")


def first_step():
    """Measures digits, cold and warm in turns."""
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
    answers() if sys.argv[1:] == ["answers"] else first_step()
