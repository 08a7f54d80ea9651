# SPDX-License-Identifier: Apache-2.0
"""Provenance of a run: versions, git commit, environment, config file and the page about it."""

import os
import pathlib
import platform
import urllib.parse
from importlib import metadata
from typing import Any

from localglobal_jax.config import loading
from localglobal_jax.parallel import placement
from localglobal_jax.training.reporting import git

# Results, which a study writes while its next runs start, are not code
RESULTS = ":(exclude)experiments/*.csv"


def commit_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the commit of `folder` and whether files differ from it; {} outside of git."""
    if commit := git.output(folder, "rev-parse", "HEAD"):
        return {"commit": commit, "dirty": git.output(folder, "status", "--porcelain") != ""}
    return {}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that determine the numbers of a run."""
    packages = ("localglobal_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in packages}


def environment(source: str | None = None) -> dict[str, str]:
    """Returns Python, system, devices and, if the code is in a git checkout, its commit.

    "-dirty" follows the commit if tracked files differ from it, but for a study's CSV files.

    Args:
      source: the config file of the run, ``FILE[:arg]``; if given, "config" is its `config_path`.
    """
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": placement.describe(),
    }
    if source:
        found["config"] = config_path(source)
    if (root := checkout()) and (commit := git.output(root, "rev-parse", "HEAD")) is not None:
        words = ("status", "--porcelain", "--untracked-files=no", "--", ".", RESULTS)
        found["commit"] = commit + ("-dirty" if git.output(root, *words) != "" else "")
    return found


def checkout() -> pathlib.Path | None:
    """Returns the git checkout of this package; None if the package is installed."""
    root = pathlib.Path(__file__).parents[3]
    # not a checkout around an installed package
    return root if (root / ".git").exists() else None


def config_path(source: str) -> str:
    """Returns ``FILE[:arg]`` with the file relative to the `checkout`, or as given if not in it."""
    path, colon, arg = source.partition(":")
    if root := checkout():
        file = loading.config_file(path)
        for whole in (os.path.abspath, os.path.realpath):  # a link may lead into the checkout
            if (known := pathlib.Path(whole(file))).is_relative_to(whole(root)):
                path = known.relative_to(whole(root)).as_posix()
                break
    # names of files may be bytes that are not UTF-8
    return f"{path}{colon}{arg}".encode("utf-8", "replace").decode()


def page_of(config: str, folder: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Returns the README.md beside a config: its path in the `checkout`, and a URL for a file.

    The URL is relative if `folder` is in the checkout, as the two may be moved together.

    Args:
      config: a `config_path`.
      folder: that of the file with the link.

    Returns:
      None if the config or the README.md is not in the checkout now, or they are at its top.
    """
    if not (found := checkout()):
        return None
    root = pathlib.Path(os.path.realpath(found))
    file = pathlib.Path(os.path.normpath(root / config.partition(":")[0]))
    page = file.with_name("README.md") if file.name else root
    if page.parent == root or not page.is_relative_to(root):
        return None
    if not (os.path.isfile(file) and os.path.isfile(page)):
        return None
    here = pathlib.Path(os.path.realpath(folder))
    inside = here.is_relative_to(root)
    url = urllib.parse.quote(os.fsencode(os.path.relpath(page, here))) if inside else page.as_uri()
    return page.relative_to(root).as_posix(), url
