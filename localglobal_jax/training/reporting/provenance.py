# SPDX-License-Identifier: Apache-2.0
"""Provenance of a run: versions, git commit, environment."""

import pathlib
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from typing import Any

from localglobal_jax.parallel import placement


def git(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the commit of `folder` and whether files differ from it; {} outside of git."""

    def run(*words: str) -> str | None:
        # without locks: else `status` would write the index
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        try:
            done = subprocess.run(  # nosec B603 # an argument list, no shell
                command, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = run("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(run("status", "--porcelain"))} if commit else {}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that determine the numbers of a run."""
    packages = ("localglobal_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in packages}


def environment() -> dict[str, str]:
    """Returns Python, system, devices and, if the code is in a git checkout, its commit."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": placement.describe(),
    }
    root = pathlib.Path(__file__).parents[3]
    if (root / ".git").exists():  # not a checkout around an installed package
        # without locks: else git would write the index
        command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always"]
        command += ["--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(  # nosec B603 # an argument list, no shell
                command, capture_output=True, text=True, check=True, timeout=10
            )
            found["commit"] = done.stdout.strip()
    return found
