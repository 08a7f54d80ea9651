# SPDX-License-Identifier: Apache-2.0
"""Provenance of a run: versions, git commit, environment."""

import pathlib
import platform
from importlib import metadata
from typing import Any

from localglobal_jax.parallel import placement
from localglobal_jax.training.reporting import git


def commit_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the commit of `folder` and whether files differ from it; {} outside of git."""
    if commit := git.output(folder, "rev-parse", "HEAD"):
        return {"commit": commit, "dirty": git.output(folder, "status", "--porcelain") != ""}
    return {}


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
        words = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        if (commit := git.output(root, *words)) is not None:
            found["commit"] = commit
    return found
