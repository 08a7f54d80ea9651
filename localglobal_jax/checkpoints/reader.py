# SPDX-License-Identifier: Apache-2.0
"""Finds, verifies and reads checkpoints, on disk or in a bucket; writes nothing.

Layout of ``checkpoints/<step>/``: ``state`` (orbax, plain nested dicts), ``metadata/metadata``
(JSON: the caller's metadata, metrics, and every leaf's path, shape, dtype and digest) and
``files.json`` (every file's checksum; a directory without it is an incomplete step). In a bucket,
where a step is written under its own name, ``commit_success.txt`` follows (see `steps`).
"""

import errno
import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from localglobal_jax.checkpoints import digests, objects, orbax_patches, store, workdir
from localglobal_jax.checkpoints import steps as steps_of

T = TypeVar("T")
# permissions, open files, memory
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SMALL = 2**18  # bytes; smaller arrays are fetched to the host for their digest
log = logging.getLogger(__name__)


class CorruptCheckpoint(RuntimeError):
    """Checkpoints exist, but the one asked for, or every one, is incomplete or damaged."""


class Deleted(ValueError):
    """A step was deleted, by the retention of the run that writes here, while it was read."""


class Damaged(Exception):
    """One step is incomplete or damaged; the message names the file or leaf."""


def read(
    path: str | os.PathLike,
    step: int | None = None,
    select: Callable[[Collection[str]], Collection[str]] | None = None,
) -> tuple[int, dict, dict]:
    """Reads and verifies a checkpoint without a template.

    Args:
      path: a workdir, its ``checkpoints`` directory, or the directory of one step.
      step: None: the newest valid step.
      select: takes the paths of all leaves and returns those to read; None: all.

    Returns:
      ``(step, nested dict of NumPy arrays, metadata)``.

    Raises:
      ValueError: there is no checkpoint, or not this step.
      CorruptCheckpoint: every checkpoint, or the given one, is damaged.
    """
    directory, own = locate(path)
    load = functools.partial(_load, directory, select)
    found, _ = newest_valid(directory, own if step is None else step, load)
    if found is None:
        raise ValueError(f"no checkpoint in {directory}: train first, or give another directory")
    return found


def steps(path: str | os.PathLike) -> list[int]:
    """Returns the steps at `path`, oldest first; for the directory of one step, those beside it."""
    return list(steps_of.scan(locate(path)[0]))


def inspect(path: str | os.PathLike, verify: bool = False) -> dict:
    """Describes the checkpoints at `path`, as JSON: ``{"directory", "latest", "steps": [{"step",
    "metadata", "metrics", "leaves", "bytes", "verified", "error"}]}``.

    ``verified`` is None unless `verify`; ``latest`` is the newest step without an error.
    """
    directory, own = locate(path)
    steps, complete = [], steps_of.scan(directory)
    for step in [own] if own is not None else complete:
        entry: dict[str, Any] = {"step": step, "error": None}
        try:
            document = document_of(directory, step)
            entry |= {key: document[key] for key in ("metadata", "metrics", "leaves")}
            sizes = (math.prod(v["shape"]) * _dtype(v).itemsize for v in entry["leaves"].values())
            entry["bytes"] = sum(sizes)
            if not complete[step]:
                raise Damaged(f"{digests.MANIFEST} is missing")
            if verify:
                _load(directory, None, step)
        except Exception as error:
            if cannot_read(error):  # says nothing about the step
                raise
            if own is None and complete[step] and not steps_of.scan(directory).get(step):
                continue  # retention deleted it
            entry["error"] = _first_line(error)
        steps.append(entry | {"verified": entry["error"] is None if verify else None})
    good = [entry["step"] for entry in steps if entry["error"] is None]
    return {"directory": str(directory), "latest": max(good, default=None), "steps": steps}


def document_of(
    directory: epath.Path, step: int, check: bool = False, share: tuple[int, int] = (0, 1)
) -> dict:
    """Returns the JSON document of a step; with `check`, (its `share` of) the files are verified.

    `share`: see `digests.check_manifest`.
    """
    if check:
        digests.check_manifest(directory / str(step), share)
    name = "metadata/metadata"
    return json.loads(dict(objects.contents(directory / str(step), {name: 0}))[name])


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the metadata of a step, or of the newest of a workdir, without reading its arrays."""
    directory, step = locate(path)
    if step is None:
        complete = [step for step, whole in steps_of.scan(directory).items() if whole]
        step = max(complete or steps_of.scan(directory))
    return document_of(directory, step)["metadata"]


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """Returns ``{"params/stem/kernel": leaf}`` and the treedef."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(flat) < len(leaves) or "" in flat:
        raise ValueError(f"the leaves of a state need distinct, non-empty paths; got {list(flat)}")
    return flat, treedef


def nest(flat: dict[str, Any]) -> dict:
    """Turns ``{"params/stem/kernel": leaf}`` into ``{"params": {"stem": {"kernel": leaf}}}``."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def describe(arrays: dict[str, Any]) -> dict[str, dict]:
    """Returns shape, dtype and digest by path; digests are computed where the array lives.

    Small arrays of this process are fetched first: compiling a program per shape takes longer.
    """
    for path, x in arrays.items():
        digests.check_dtype(x.dtype, path)
    there = {
        path
        for path, x in arrays.items()
        if isinstance(x, jax.Array) and (x.nbytes > SMALL or not x.is_fully_addressable)
    }
    fetched = jax.device_get(
        {path: digests.on_device(x) if path in there else x for path, x in arrays.items()}
    )
    lanes = {k: x if k in there else digests.on_host(x) for k, x in fetched.items()}
    return {
        path: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": digests.text(lanes[path])}
        for path, x in arrays.items()
    }


def check_same(written: dict[str, dict], found: dict[str, dict]) -> None:
    """Raises Damaged, naming the leaves, unless the arrays read equal those written."""
    wrong = [path for path in written if written[path] != found[path]]
    if wrong:
        shown = ", ".join(wrong[:10]) + ", ..." * (len(wrong) > 10)
        raise Damaged(f"the digest does not match in {len(wrong)} leaves: {shown}")


def check_template(wanted: dict[str, Any], leaves: dict[str, dict], where: Any) -> None:
    """Raises ValueError listing every difference between a flat template and the saved leaves."""
    lines = [f"{path}: not in the checkpoint" for path in wanted if path not in leaves]
    lines += [f"{path}: only in the checkpoint" for path in leaves if path not in wanted]
    for path in wanted.keys() & leaves.keys():
        here = str(wanted[path].dtype), str(tuple(wanted[path].shape))
        there = leaves[path]["dtype"], str(tuple(leaves[path]["shape"]))
        if here != there:
            lines.append(f"{path}: {' '.join(there)} in the checkpoint, {' '.join(here)} wanted")
    if lines:
        shown = "\n  ".join(sorted(lines)[:40] + [f"... {len(lines)} in all"] * (len(lines) > 40))
        raise ValueError(
            f"checkpoint {where} does not match the state to restore:\n  {shown}\n"
            "Nothing is cast or filled in. Restore with the config it was saved with "
            "(`localglobal inspect` shows it), or train in a new workdir."
        )
    for leaf in wanted.values():
        if getattr(leaf, "sharding", None) is not None:
            leaf.sharding.shard_shape(tuple(leaf.shape))  # ValueError if it does not divide


def read_arrays(
    directory: epath.Path, step: int, wanted: dict[str, Any], *, part: bool = False
) -> dict[str, Any]:
    """Reads arrays by path, unverified: JAX arrays where a sharding is given, else NumPy arrays.

    Unless `wanted` is a `part` of the step, other arrays in the step are an error.
    """

    def how(leaf: Any) -> ocp.RestoreArgs:
        if getattr(leaf, "sharding", None) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)

    full = {path: leaf for path, leaf in wanted.items() if math.prod(leaf.shape)}
    # The handler, not a Checkpointer: its barrier would hang where one host fails to read.
    path = directory / str(step)
    if workdir.is_remote(directory):
        orbax_patches.limit_retries()
    with store.named(path), store.told(path, "reading"):
        nested = ocp.PyTreeCheckpointHandler().restore(
            directory / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=nest(full),
                restore_args=nest({path: how(leaf) for path, leaf in full.items()}),
                transforms={} if part else None,
            ),
        )
    flat, _ = flatten(nested)
    for path in wanted.keys() - full.keys():  # orbax cannot store empty arrays
        empty = np.zeros(wanted[path].shape, wanted[path].dtype)
        sharding = getattr(wanted[path], "sharding", None)
        flat[path] = empty if sharding is None else jax.device_put(empty, sharding)
    return {path: flat[path] for path in wanted}


def all_hosts_agree(load: Callable[[], T]) -> T:
    """Runs `load` on every host; raises Damaged on all of them if it fails on one.

    If one of them cannot read (`cannot_read`), all raise: the step may be whole.
    """
    result, error = None, None
    try:
        result = load()
    except Exception as caught:
        error = caught
    failed = np.asarray([cannot_read(error), error is not None])
    failed = multihost_utils.process_allgather(failed).reshape(-1, 2).any(axis=0)
    if failed[0]:
        alone = store.StoreFailed("another host cannot read the checkpoint: its log has the reason")
        raise error if error and cannot_read(error) else alone
    if failed[1]:
        raise Damaged(_first_line(error) if error else "unreadable on another host") from error
    return result  # type: ignore[return-value]


def cannot_read(error: Exception | None) -> bool:
    """Returns whether an error says that this process cannot read, and nothing about the files."""
    if isinstance(error, store.StoreFailed):
        return True
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return os_error(error) in UNREADABLE


def os_error(error: Exception | None) -> int | None:
    """Returns the errno of an OSError or of an error of tensorstore; None for others."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return int(number[1]) if number else None


def newest_valid(
    directory: epath.Path, step: int | None, load: Callable[[int], T]
) -> tuple[T | None, set[int]]:
    """Returns `load` of the given step, or of the newest valid one, and the damaged steps.

    A step is damaged where `load` raises Damaged and the step is still there. The first value is
    None if there is no step. Raises CorruptCheckpoint if every step, or the given one, is damaged,
    and Deleted if the given one was deleted meanwhile.
    """
    complete = steps_of.scan(directory)
    steps = list(complete)
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    damaged: dict[int, str] = {}
    for candidate in [step] if step is not None else reversed(steps):
        try:
            found = load(candidate)
        except Damaged as error:
            now = steps_of.scan(directory)
            if complete[candidate] and not now.get(candidate):  # retention deleted it
                if step is None:
                    return newest_valid(directory, None, load)
                raise Deleted(
                    f"{directory}: step {step} was deleted while it was read (checkpoint.keep of "
                    f"the run that writes here). Now there are {list(now)}"
                ) from error
            damaged[candidate] = f"step {candidate}: {error}"
            log.error("checkpoint %s is damaged: %s", directory / str(candidate), error)
            continue
        if damaged:
            log.error("going back to the checkpoint of step %d", candidate)
        return found, set(damaged)
    if not damaged:
        return None, set()
    if step is not None:
        others = [other for other in steps if other != step]
        raise CorruptCheckpoint(
            f"{directory}: {damaged[step]}. Other steps: {others or 'none'}. Without a step, "
            "the newest valid one is taken"
        )
    raise CorruptCheckpoint(
        f"no valid checkpoint in {directory}; " + "; ".join(damaged.values()) + ". To start over, "
        "use another workdir or remove this directory."
    )


def _load(
    directory: epath.Path,
    select: Callable[[Collection[str]], Collection[str]] | None,
    step: int,
) -> tuple[int, dict, dict]:
    """Reads and verifies one step; raises Damaged, but for `cannot_read` and errors of `select`."""
    try:
        document = document_of(directory, step, check=True)
        leaves = document["leaves"]
    except Exception as error:
        raise error if cannot_read(error) else Damaged(_first_line(error)) from error
    if select:
        leaves = {path: leaves[path] for path in select(leaves)}
    try:
        wanted = {k: jax.ShapeDtypeStruct(tuple(v["shape"]), _dtype(v)) for k, v in leaves.items()}
        flat = read_arrays(directory, step, wanted, part=select is not None)
        check_same(leaves, describe(flat))
    except Exception as error:
        raise error if cannot_read(error) else Damaged(_first_line(error)) from error
    return step, nest(flat), document["metadata"]


def locate(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
    """Returns the directory of checkpoints and, if the path is one step, its number."""
    given = workdir.absolute(path)
    inside = _inside(given)
    if given.name.isdigit() and inside & {"state", "metadata", digests.MANIFEST}:
        return given.parent, int(given.name)
    directory = given / "checkpoints" if "checkpoints" in inside else given
    if not steps_of.scan(directory):
        raise workdir.without_checkpoint(given)
    return directory, None


def _inside(directory: epath.Path) -> set[str]:
    """Returns the names of the files and folders in a directory; empty without one."""
    if workdir.is_remote(directory):
        return {name.split("/")[0] for name in objects.sizes(directory)}
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def _dtype(leaf: dict) -> np.dtype:
    return jnp.dtype(leaf["dtype"])  # knows bfloat16, unlike NumPy


def _first_line(error: BaseException) -> str:
    return f"{error}".strip().split("\n")[0] or type(error).__name__
