# SPDX-License-Identifier: Apache-2.0
"""Writes scripts and calls external tools (sbatch, xpk, gcloud)."""

import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from localglobal_jax.launch.backend import Say, Started
from localglobal_jax.launch.exit_codes import ExitCode


def need(tool: str, how: str) -> None:
    """Raises ValueError, with `how` to install it, if `tool` is not on the PATH."""
    if shutil.which(tool) is None:
        raise ValueError(f"{tool} is not installed here: {how}; or use --out or --dry_run")


def write(files: Mapping[str, str], folder: pathlib.Path) -> list[str]:
    """Writes `files` (scripts: executable) and returns their paths.

    A script that runs now is replaced, not changed: bash reads its file while it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        path = folder / name
        new = folder / f".{name}.{os.getpid()}"
        new.write_text(text, encoding="utf-8")
        new.chmod(0o755)
        new.replace(path)
        paths.append(str(path))
    return paths


def call(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Returns the exit code and output of a tool; every question it asks is answered with no."""
    done = subprocess.run(  # nosec B603 # an argument list, no shell
        command,
        env=dict(environment),
        input="n\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip()


def report(code: ExitCode, states: Mapping[str, str], output: str, say: Say) -> Started:
    """Says the state of every run and the tool's output, and returns them."""
    for name, state in states.items():
        say(f"{state:<8} {name}")
    say(output)
    return Started(code, {name: {"state": state} for name, state in states.items()})
