# SPDX-License-Identifier: Apache-2.0
"""Runs git. Imports no jax."""

import os
import subprocess

TIMEOUT = 10  # seconds


def output(folder: str | os.PathLike[str], *words: str) -> str | None:
    """Returns the output of a git command in `folder`; None if it fails or is not installed."""
    # without locks: else `status` would write the index
    command = ["git", "--no-optional-locks", "-C", os.fspath(folder), *words]
    try:
        done = subprocess.run(  # nosec B603 # an argument list, no shell
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
