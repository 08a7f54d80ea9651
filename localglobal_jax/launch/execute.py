# SPDX-License-Identifier: Apache-2.0
"""Writes scripts and calls the tools of others: the thin part that does something."""

import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence

INSTALL = {
    "sbatch": "it comes with SLURM: start this on a login node of the cluster",
    "xpk": "python -m venv xpk && xpk/bin/pip install xpk, and put xpk/bin on the PATH",
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
}


def need(tool: str) -> None:
    """Raises ValueError, saying how to get it, if `tool` is not installed."""
    if shutil.which(tool) is None:
        raise ValueError(
            f"{tool} is not installed here: {INSTALL[tool]}; or use --out or --dry_run"
        )


def write(files: Mapping[str, str], folder: pathlib.Path) -> list[str]:
    """Writes `files` (scripts: executable) and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        paths.append(str(path))
    return paths


def call(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and all output of a tool; the answer to whatever it may ask is no."""
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


def queued(job: str, environment: Mapping[str, str]) -> set[tuple[int, int]]:
    """(array, task) of what waits or runs already of the SLURM jobs of that name."""
    command = ["squeue", "--me", "--array", "--noheader", f"--name={job}", "--format=%F %K"]
    code, output = call(command, environment)
    if code:
        raise OSError(f"squeue failed, so runs might be started twice: {output}")
    pairs = (line.split() for line in output.splitlines())
    return {(int(p[0]), int(p[1])) for p in pairs if len(p) == 2 and all(map(str.isdigit, p))}
