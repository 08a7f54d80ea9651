# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: find it, check it, read it. Nothing here writes, nothing is believed.

Layout of ``checkpoints/<step>/``: ``state`` (orbax, plain nested dicts), ``metadata/metadata``
(JSON: the caller's metadata, metrics, and every leaf's path, shape, dtype and digest) and
``files.json`` (every file's checksum; without it the directory is no complete step).
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from localglobal_jax.checkpoints import digests as digest

T = TypeVar("T")
SMALL = 2**18  # bytes
log = logging.getLogger(__name__)


class CorruptCheckpoint(RuntimeError):
    """Checkpoints exist, but the one asked for, or every one, is incomplete or damaged."""


class Damaged(Exception):
    """This step cannot be believed; the message names the file or leaf."""


def read(path: str | os.PathLike, step: int | None = None) -> tuple[int, dict, dict]:
    """(step, nested dict of NumPy arrays, metadata), checked, with no template.

    Args:
      path: a workdir, its ``checkpoints`` directory, or one step in there.
      step: None: the newest good one.

    Raises:
      ValueError: there is no checkpoint, or not this step.
      CorruptCheckpoint: there is none that is undamaged.
    """
    directory, own = _locate(path)
    found, _ = newest_valid(directory, own if step is None else step, lambda s: _load(directory, s))
    if found is None:
        raise ValueError(f"no checkpoint in {directory}: train first, or give another directory")
    return found


def steps(path: str | os.PathLike) -> list[int]:
    """Of the checkpoints there, oldest first; of one step's folder, those beside it."""
    return directories(_locate(path)[0])


def inspect(path: str | os.PathLike, verify: bool = False) -> dict:
    """What is in there, as JSON: ``{"directory", "latest", "steps": [{"step", "metadata",
    "metrics", "leaves", "bytes", "verified", "error"}]}``.

    ``verified`` is None unless asked for; ``latest`` is the newest step without an error.
    """
    directory, own = _locate(path)
    steps = []
    for step in [own] if own is not None else directories(directory):
        entry: dict[str, Any] = {"step": step, "error": None}
        try:
            document = document_of(directory, step)
            entry |= {key: document[key] for key in ("metadata", "metrics", "leaves")}
            sizes = (math.prod(v["shape"]) * _dtype(v).itemsize for v in entry["leaves"].values())
            entry["bytes"] = sum(sizes)
            if not (directory / str(step) / digest.MANIFEST).exists():
                raise Damaged(f"{digest.MANIFEST} is missing")
            if verify:
                _load(directory, step)
        except Exception as error:
            entry["error"] = _first_line(error)
        steps.append(entry | {"verified": entry["error"] is None if verify else None})
    good = [entry["step"] for entry in steps if entry["error"] is None]
    return {"directory": str(directory), "latest": max(good, default=None), "steps": steps}


def directories(directory: epath.Path) -> list[int]:
    """Everything that looks like a step: a number for a name, and not empty."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted(int(path.name) for path in found if any(path.iterdir()))


def document_of(directory: epath.Path, step: int, check: bool = False) -> dict:
    """Our JSON document of a step; with ``check``, after every file was compared."""
    if check:
        digest.check_manifest(directory / str(step))
    return json.loads((directory / str(step) / "metadata" / "metadata").read_text())


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """{"params/stem/kernel": leaf} and the treedef."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(flat) < len(leaves) or "" in flat:
        raise ValueError(f"the leaves of a state need distinct, non-empty paths; got {list(flat)}")
    return flat, treedef


def nest(flat: dict[str, Any]) -> dict:
    """{"params/stem/kernel": leaf} -> {"params": {"stem": {"kernel": leaf}}}."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def describe(arrays: dict[str, Any]) -> dict[str, dict]:
    """Shape, dtype and digest by path, computed where the array lives.

    Small arrays of this process alone are fetched instead: compiling for each shape takes longer.
    """
    for path, x in arrays.items():
        digest.check_dtype(x.dtype, path)
    there = {
        path
        for path, x in arrays.items()
        if isinstance(x, jax.Array) and (x.nbytes > SMALL or not x.is_fully_addressable)
    }
    fetched = jax.device_get(
        {path: digest.on_device(x) if path in there else x for path, x in arrays.items()}
    )
    digests = {k: x if k in there else digest.on_host(x) for k, x in fetched.items()}
    return {
        path: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": digest.text(digests[path])}
        for path, x in arrays.items()
    }


def check_same(written: dict[str, dict], found: dict[str, dict]) -> None:
    """Raises Damaged, naming the leaves, unless what was read is what was written."""
    wrong = [path for path in written if written[path] != found[path]]
    if wrong:
        shown = ", ".join(wrong[:10]) + ", ..." * (len(wrong) > 10)
        raise Damaged(f"the digest does not match in {len(wrong)} leaves: {shown}")


def check_template(wanted: dict[str, Any], leaves: dict[str, dict], where: Any) -> None:
    """ValueError with every difference between a flat template and the leaves that were saved."""
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
            f"checkpoint {where} holds another state than the one asked for:\n  {shown}\n"
            "Nothing is cast or filled in. Restore with the config it was saved with "
            "(`localglobal inspect` shows it), or train in a new workdir."
        )
    for leaf in wanted.values():
        if getattr(leaf, "sharding", None) is not None:
            leaf.sharding.shard_shape(tuple(leaf.shape))  # ValueError if it does not divide


def read_arrays(directory: epath.Path, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """Flat arrays, unchecked: jax arrays where a sharding is given, NumPy arrays elsewhere."""

    def how(leaf: Any) -> ocp.RestoreArgs:
        if getattr(leaf, "sharding", None) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)

    full = {path: leaf for path, leaf in wanted.items() if math.prod(leaf.shape)}
    # The handler, not a Checkpointer: a barrier in there would hang where one host fails to read.
    nested = ocp.PyTreeCheckpointHandler().restore(
        directory / str(step) / "state",
        args=ocp.args.PyTreeRestore(
            item=nest(full), restore_args=nest({path: how(leaf) for path, leaf in full.items()})
        ),
    )
    flat, _ = flatten(nested)
    for path in wanted.keys() - full.keys():  # orbax cannot store what is empty
        empty = np.zeros(wanted[path].shape, wanted[path].dtype)
        sharding = getattr(wanted[path], "sharding", None)
        flat[path] = empty if sharding is None else jax.device_put(empty, sharding)
    return {path: flat[path] for path in wanted}


def all_hosts_agree(what: Callable[[], T]) -> T:
    """Does it on every host; if it fails on one, all of them take the step for damaged."""
    result, error = None, None
    try:
        result = what()
    except Exception as caught:
        error = caught
    if multihost_utils.process_allgather(np.asarray(error is not None)).any():
        raise Damaged(_first_line(error) if error else "unreadable on another host") from error
    return result  # type: ignore[return-value]


def newest_valid(
    directory: epath.Path, step: int | None, load: Callable[[int], T]
) -> tuple[T | None, set[int]]:
    """`load` of the given step, or of the newest it does not raise Damaged for; and those it did.

    None if there is no step at all; CorruptCheckpoint if there are only damaged ones.
    """
    steps = directories(directory)
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    damaged: dict[int, str] = {}
    for candidate in [step] if step is not None else reversed(steps):
        try:
            found = load(candidate)
        except Damaged as error:
            damaged[candidate] = f"step {candidate}: {error}"
            log.error("checkpoint %s is damaged: %s", directory / str(candidate), error)
            continue
        if damaged:
            log.error("going back to the checkpoint of step %d", candidate)
        return found, set(damaged)
    if not damaged:
        return None, set()
    raise CorruptCheckpoint(
        f"no good checkpoint in {directory}; " + "; ".join(damaged.values()) + ". To start over "
        "knowingly, use another workdir or remove this directory."
    )


def _load(directory: epath.Path, step: int) -> tuple[int, dict, dict]:
    """`read` of one step; Damaged whatever goes wrong."""
    try:
        document = document_of(directory, step, check=True)
        leaves = document["leaves"]
        wanted = {k: jax.ShapeDtypeStruct(tuple(v["shape"]), _dtype(v)) for k, v in leaves.items()}
        flat = read_arrays(directory, step, wanted)
        check_same(leaves, describe(flat))
    except Exception as error:
        raise Damaged(_first_line(error)) from error
    return step, nest(flat), document["metadata"]


def _locate(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
    """The directory of checkpoints and, if the path is one step, its number."""
    given = epath.Path(path).expanduser().absolute()
    parts = ("state", "metadata", digest.MANIFEST)
    if given.name.isdigit() and any((given / part).exists() for part in parts):
        return given.parent, int(given.name)
    directory = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if not directories(directory):
        raise ValueError(
            f"no checkpoint in {given}: expected a workdir (with checkpoints/<step>/), "
            "its checkpoints directory, or one step directory"
        )
    return directory, None


def _dtype(leaf: dict) -> np.dtype:
    return jnp.dtype(leaf["dtype"])  # knows bfloat16, unlike NumPy


def _first_line(error: BaseException) -> str:
    return f"{error}".strip().split("\n")[0] or type(error).__name__


def check_labels(labels: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Raises ValueError if a checkpoint was trained on other classes, or in another order."""
    then = metadata.get("labels")  # older checkpoints do not say
    if then and labels and list(then) != list(labels):
        raise ValueError(
            f"the data has the classes {_shown(labels)}; the checkpoint was trained on "
            f"{_shown(then)}, so its numbers mean others. Have the same classes (a folder for "
            "each, if need be an empty one), or begin another run"
        )


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:20]) + f" and {len(labels) - 20} more" * (len(labels) > 20)
