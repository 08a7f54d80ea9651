# SPDX-License-Identifier: Apache-2.0
"""Finds the steps in a directory of checkpoints, and those of them that are complete.

On disk a step gets its name, by a rename, once all its files are written, the manifest last. In a
bucket a step is written under its own name: the manifest follows all other objects, and `WRITTEN`
follows it. With neither of them the save is under way, or was interrupted: there is no such step.
With `WRITTEN` alone the manifest was lost, and the step is damaged.
"""

import contextlib
from collections.abc import Iterable

from etils import epath

from localglobal_jax.checkpoints import digests, objects, workdir

WRITTEN = "commit_success.txt"  # orbax's mark; it reads no arrays in a bucket without it
MARKS = (WRITTEN, digests.MANIFEST)  # in the order of their deletion, before all other objects


def scan(directory: epath.Path) -> dict[int, bool]:
    """Returns the steps in ascending order, and whether each is complete (has a manifest).

    A step is a non-empty directory named by a number; in a bucket without interrupted saves.
    """
    found = dict[int, bool]()
    if workdir.is_remote(directory):
        for step, names in _by_step(objects.sizes(directory)).items():
            if names & {*MARKS}:
                found[step] = digests.MANIFEST in names
    elif directory.is_dir():
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a run deletes its old checkpoints
                if path.name.isdigit() and path.is_dir() and any(path.iterdir()):
                    found[int(path.name)] = (path / digests.MANIFEST).exists()
    return dict(sorted(found.items()))


def interrupted(directory: epath.Path) -> list[int]:
    """Returns the steps in a bucket whose save is under way or was interrupted."""
    by_step = _by_step(objects.sizes(directory))
    return sorted(s for s, names in by_step.items() if not names & {*MARKS})


def _by_step(names: Iterable[str]) -> dict[int, set[str]]:
    """Returns, for every directory named by a number, the names of the objects below it."""
    found = dict[int, set[str]]()
    for name in names:
        step, _, inside = name.partition("/")
        if inside and step.isdigit():
            found.setdefault(int(step), set()).add(inside)
    return found
