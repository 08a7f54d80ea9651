# SPDX-License-Identifier: Apache-2.0
"""Patches for five defects of orbax 0.12 and tensorstore 0.1.86 that end, bloat or delay runs.

- Orbax measures the time limit of a save (ten minutes) by the wall clock. Where that clock jumps
  ahead, as on a machine that wakes up, a save "times out" and the process hangs at its end. The
  patch gives orbax the monotonic clock.
- tensorstore never frees the JSON that it returns to Python. Orbax requests it once per leaf, and
  twice for its statistics, in every save: about 120 KB for 150 leaves, 8 % of the resident memory
  in an hour of frequent saves. The patch caches it per path and leaves the statistics out.
- After it deletes a step in a bucket, orbax reads the bucket's own metadata, by another client. It
  needs a permission (storage.buckets.get) that the role Storage Object Admin does not include. It
  deletes in any order. The patch deletes the step's manifest first, so that a kill leaves no half
  step that counts as a whole one.
- Orbax cuts every replicated array among the devices that hold it. The first save compiles a
  program for each shape (24 for the smallest CoAtNet on two devices, 0.5 s of its run's 6), and the
  slice of a bias is a few bytes. The patch saves arrays whole where a slice is below `SLICE`.
- Orbax repeats a request to a bucket for a quarter of an hour. The patch has `store`'s limit.

Each has a test in manager_test.py or gcs_test.py of tests/checkpoints, which fails once the patch
no longer works.
"""

import functools
import json
import time
import types
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from localglobal_jax.checkpoints import objects, steps, store
from localglobal_jax.parallel import private_names

SLICE = 2**20  # bytes of an array that a device saves for the others


class _Spec:
    """Replaces `tensorstore.KvStore.Spec`; its JSON is cached."""

    def __init__(self, given: Any):
        self.given = given

    def to_json(self) -> Any:
        return json.loads(_resolved(json.dumps(self.given)))


@functools.lru_cache(8)
def _resolved(given: str) -> str:
    """Returns the JSON of the spec with its defaults filled in."""
    return json.dumps(tensorstore.KvStore.Spec(json.loads(given)).to_json())


class _KvStore:
    """Replaces `tensorstore.KvStore` in orbax's `tensorstore_utils`: the attributes used there."""

    Spec = _Spec

    @staticmethod
    def open(spec: _Spec, **options: Any) -> Any:
        return tensorstore.KvStore.open(tensorstore.KvStore.Spec(spec.given), **options)


class _TensorStore:
    """Replaces the module `tensorstore`; everything but `KvStore` is passed through."""

    KvStore = _KvStore

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore, name)


def _rmtree(path: epath.Path, *, missing_ok: bool = False) -> None:
    objects.delete_all(path, first=steps.MARKS)


@functools.cache
def limit_retries() -> None:
    """Bounds the retries of orbax's requests to a bucket, which last a quarter of an hour else."""
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        getattr(_utils(), name)["gcs_request_retries"] = store.TENSORSTORE


@functools.cache
def apply_patches() -> None:
    """Installs the patches, before the first save."""
    limit_retries()
    for name in ("future", "signaling_client"):
        module = private_names.find(f"orbax.checkpoint._src.futures.{name}")
        module.time = types.SimpleNamespace(time=time.monotonic)
    tensorstore_utils = _utils()
    tensorstore_utils.ts = _TensorStore()
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *args, **kwargs: 0  # only logged
    private_names.find("orbax.checkpoint._src.path.gcs_utils").rmtree = _rmtree
    # registering another handler in its place would print a warning
    handler: Any = ocp.type_handlers.get_type_handler(jax.Array)
    handler._min_slice_bytes_for_replica_parallel = SLICE


def _utils() -> Any:
    return private_names.find("orbax.checkpoint._src.serialization.tensorstore_utils")
