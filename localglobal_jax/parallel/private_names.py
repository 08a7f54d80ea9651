# SPDX-License-Identifier: Apache-2.0
"""Private names of jax and orbax, which have no public counterpart: all of them, in one place.

They are looked up when they are used. Modules, weights and checkpoints that are only read need
none of them, so they work with versions of jax and orbax that lack some.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import Any

PURPOSES = {
    "jax._src.clusters.ClusterEnv": "--distributed detects the cluster",
    "jax._src.distributed.global_state": "barriers of several hosts have a time limit",
    "orbax.checkpoint._src.futures.future": "a save is timed by the monotonic clock",
    "orbax.checkpoint._src.futures.signaling_client": "a save is timed by the monotonic clock",
    "orbax.checkpoint._src.path.gcs_utils": "a step in a bucket is deleted in a safe order",
    "orbax.checkpoint._src.serialization.tensorstore_utils": "reads of a bucket end after minutes",
}


class MissingPrivateName(RuntimeError):
    """The installed jax or orbax lacks a private name; the message gives version and purpose."""


@functools.cache
def find(name: str) -> Any:
    """Returns the module or attribute `name`, a key of `PURPOSES`, or raises MissingPrivateName."""
    parent, _, attribute = name.rpartition(".")
    try:
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    except ModuleNotFoundError:  # the parent is a module, not a package, or is absent
        pass
    try:
        return getattr(importlib.import_module(parent), attribute)
    except (ImportError, AttributeError):
        library = "jax" if name.startswith("jax.") else "orbax-checkpoint"
        raise MissingPrivateName(
            f"{library} {importlib.metadata.version(library)} has no {name}, by which "
            f"{PURPOSES[name]}. Install the versions that the extra train names: "
            "pip install --upgrade 'localglobal_jax[train]'"
        ) from None
