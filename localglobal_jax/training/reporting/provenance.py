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
    """The commit that `folder` is at, and whether files differ from it; {} outside of git."""

    def ask(*words: str) -> str | None:
        # without locks: else `status` would write the index
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        try:
            done = subprocess.run(  # nosec B603 # an argument list, no shell
                command, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain"))} if commit else {}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = ("localglobal_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in packages}


def environment() -> dict[str, str]:
    """Where this process runs and, if its code is in a git checkout, of which commit."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": placement.describe(),
    }
    root = pathlib.Path(__file__).parents[3]
    if (root / ".git").exists():  # else git would tell of whatever is around an installed package
        # without locks: else git would write the index
        command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always"]
        command += ["--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(  # nosec B603 # an argument list, no shell
                command, capture_output=True, text=True, check=True, timeout=10
            )
            found["commit"] = done.stdout.strip()
    return found
