# SPDX-License-Identifier: Apache-2.0
"""Saves and restores the steps of a run: orbax's `CheckpointManager`, with every step verified.

Orbax alone restores flipped bits without an error, casts to the template's dtype, counts an empty
directory as a step, and keeps a failed asynchronous save in its list. Here a step gets its name,
by one rename, after all its files are written and listed with checksums. Reading checks the files,
then the tree, then the digest of every leaf (`reader`, `digests`). A damaged step is logged and the
next older one is used; if all are damaged, the run ends with an error instead of starting over.

In a bucket, where a rename is not atomic, a step is written in place and its list of files last.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from localglobal_jax.checkpoints import (
    digests,
    objects,
    orbax_patches,
    reader,
    steps,
    store,
    workdir,
)
from localglobal_jax.config import schema
from localglobal_jax.parallel import host_memory, multihost

# Orbax logs every phase of a save at INFO, and a failed save as five tracebacks from five threads;
# `SaveFailed` reports it in one line.
absl.logging.set_verbosity(absl.logging.WARNING)
absl.logging.get_absl_logger().addFilter(
    lambda record: (
        not record.exc_info
        or "orbax" not in record.pathname
        or bool(os.environ.get("LOCALGLOBAL_DEBUG"))
    )
)

PyTree = Any
FORMAT = 1
TRASH = "deleted"  # steps are moved there before deletion, so that a kill leaves no half step
log = logging.getLogger(__name__)

# Orbax numbers the saves of a process, whichever manager writes them, and two at once wait for each
# other's signals: several runs in threads (of one host) save one after the other.
_ONE_SAVE = threading.Lock()
_saving: list[ocp.CheckpointManager] = []  # the one that may be writing


class SaveFailed(OSError):
    """A step could not be written; earlier steps are unchanged."""


class Restored(NamedTuple):
    """A restored step: its number, its state and its metadata."""

    step: int
    state: PyTree
    metadata: dict


class _Committed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory of a step, with a manifest written before the final rename."""

    async def finalize(self) -> None:
        final = self.get_final()
        if not final.name.isdigit():  # one item of a step
            return await super().finalize()
        # The intermediate name still contains "tmp", so that orbax removes it after a kill.
        self._final_path = final.with_name(self.get().name + "-complete")
        await super().finalize()
        digests.write_manifest(self._final_path)
        self._final_path.rename(final)
        self._final_path = final


class _CommittedInPlace(ocp.path.atomicity.CommitFileTemporaryPath):
    """Orbax's directory of a step in a bucket, written under its own name; the manifest is last.

    In a bucket the rename of a directory is a copy of every object, and not atomic. Directories
    are not made there, and the time stamps that orbax keeps beside its files are left out: both
    take requests.
    """

    ABOUT = "_CHECKPOINT_METADATA"  # orbax adds the names of its handlers, and warns without it
    _about: Any = None  # orbax's writer of that file
    _failed: Exception | None = None

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> "_CommittedInPlace":
        made = cls(final_path, final_path, file_options=options.get("file_options"))
        made._about = options.get("checkpoint_metadata_store")
        return made

    @classmethod
    async def validate_final(cls, final_path: epath.Path) -> None:
        """Raises orbax's error for a step that is not complete."""
        if not await asyncio.to_thread((final_path / digests.MANIFEST).exists):
            raise ocp.path.atomicity.ValidationError(f"{final_path} has no {digests.MANIFEST}")

    async def create(self) -> epath.Path:
        if self.get().name.isdigit():  # a step, not one item of it
            try:
                await asyncio.to_thread(objects.write, self.get(), {self.ABOUT: b"{}"})
            except Exception as error:  # raised here, it lets threads of orbax wait ten minutes
                self._failed = error
        return self.get()

    async def finalize(self) -> None:
        if self._failed:
            raise self._failed
        if self._about:  # its thread would write `ABOUT` after the manifest
            await asyncio.to_thread(self._about.wait_until_finished)
        await asyncio.to_thread(self._finish)

    def _finish(self) -> None:
        path = self.get_final()
        if path.name.isdigit():
            digests.write_manifest(path)
        if path.name.isdigit() or path.name == "state":  # plain orbax reads no `state` without
            objects.write(path, {steps.WRITTEN: b""})


class _Best:
    """Orbax's policy that preserves the step of the largest score, the newest of equals."""

    def __init__(self, score: Callable[[int, dict | None], float]):
        self._score = score

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = {info.step: self._score(info.step, info.metrics) for info in checkpoints}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        return [info.step == best for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run. Reading changes nothing on disk; the first save tidies up."""

    def __init__(self, directory: str | os.PathLike, options: schema.Checkpoints):
        self.directory = workdir.absolute(directory)
        self._remote = workdir.is_remote(directory)
        self._options = options
        best = options.best or ""
        self._best, self._sign = best.removeprefix("-"), -1 if best.startswith("-") else 1
        self._manager: ocp.CheckpointManager | None = None
        self._recorded: dict[int, dict] = {}  # the metrics of steps without orbax's
        self._listed: list[int] = []  # the complete steps, when they were last listed
        self._damaged: set[int] = set()  # found by `restore`, moved aside before the next save

    def steps(self) -> list[int]:
        """Returns the complete steps, oldest first, without a save that is still being written."""
        found = steps.scan(self.directory).items()
        self._listed = [step for step, complete in found if complete]
        return self._listed

    def best(self) -> int | None:
        """Returns the step with the best ``options.best``, the newest of equals; or None."""
        values = {}
        for step in self.steps():
            try:
                metrics = reader.document_of(self.directory, step)["metrics"]
                values[step] = self._sign * self._named(metrics)[self._best]
            except Exception as error:  # damage is reported when the step is restored
                if reader.cannot_read(error):
                    raise
                log.debug("step %d has no metrics: %s", step, error)
        return max(values, key=lambda step: (values[step], step), default=None)

    def save(
        self, step: int, state: PyTree, *, metadata: dict, metrics: dict | None = None
    ) -> bool:
        """Starts writing a step; returns once the state may be changed or donated.

        Args:
          state: arrays in any tree; PRNG keys as `jax.random.key_data`.
          metadata: JSON: config, versions, position in the data.
          metrics: numbers; unless empty, they must contain ``options.best``.

        Returns:
          False if this step is complete already; it is not written again.

        Raises:
          ValueError, TypeError: the state or the metadata cannot be saved.
          SaveFailed: this save failed, or the previous one, which was still being written.
        """
        arrays = _as_arrays(state)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics and self._best and self._best not in self._named(metrics):
            raise ValueError(
                f'checkpoint.best="{self._options.best}": the metrics are {sorted(metrics)}'
            )
        json.dumps(metadata)  # raises TypeError now, not in the background
        self.wait()
        if self._damaged:
            self.close()
        elif step in self.steps():
            return False
        document: dict[str, Any] = {
            "format": FORMAT,
            "metadata": metadata,
            "metrics": {name: x for name, x in metrics.items() if math.isfinite(x)},
            "leaves": reader.describe(arrays),
        }
        filled = {k: x for k, x in arrays.items() if x.size}  # orbax cannot store empty arrays
        items = ocp.args.Composite(
            state=(ocp.args.PyTreeSave if self._remote else ocp.args.StandardSave)(
                reader.nest(filled)
            ),
            metadata=ocp.args.JsonSave(document),
        )
        with self._or_abandon(), _ONE_SAVE:
            with store.told(self.directory, "waiting for another run's save before writing to"):
                while any(one.is_saving_in_progress() for one in _saving[:]):
                    time.sleep(0.01)
            self._manager = self._manager or self._open()
            self._recorded[step] = document["metrics"]
            self._manager.save(step, args=items, metrics=document["metrics"], force=True)
            _saving[:] = [self._manager]
        return True

    def restore(self, template: PyTree, step: int | None = None) -> Restored | None:
        """Restores the newest valid step, or the given one, into the template's shardings.

        Args:
          template: a tree of `jax.ShapeDtypeStruct`, or arrays. Leaves without a sharding come
            back on the default device.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          ValueError: tree, shape or dtype differ from the template's, or the step does not exist.
          CorruptCheckpoint: the given step, or every step, is damaged.
        """
        wanted, tree = reader.flatten(template)
        share = multihost.rank(), multihost.count()

        def load(step: int) -> Restored:
            document = reader.all_hosts_agree(
                lambda: reader.document_of(self.directory, step, check=True, share=share)
            )
            reader.check_template(wanted, document["leaves"], self.directory / str(step))
            flat = reader.all_hosts_agree(lambda: reader.read_arrays(self.directory, step, wanted))
            flat = {k: x if isinstance(x, jax.Array) else jnp.array(x) for k, x in flat.items()}
            reader.check_same(document["leaves"], reader.describe(flat))
            return Restored(step, tree.unflatten(list(flat.values())), document["metadata"])

        self.wait()
        restored, damaged = reader.newest_valid(self.directory, step, load)
        self._damaged |= damaged
        return restored

    def wait(self) -> None:
        """Blocks until the current save is complete; raises SaveFailed if it fails."""
        if self._manager:
            with self._or_abandon(), store.told(self.directory, "writing to"):
                self._manager.wait_until_finished()
            with contextlib.suppress(ValueError):  # a thread may have put its own there
                _saving.remove(self._manager)
            host_memory.trim_heap()
            trash = self.directory / TRASH
            if multihost.rank() == 0 and not self._remote and trash.exists():
                trash.rmtree()

    def close(self) -> None:
        """Waits for the current save and ends orbax's threads; the object stays usable."""
        self.wait()
        if self._manager:
            self._manager.close()
            self._manager = None

    @contextlib.contextmanager
    def _or_abandon(self) -> Any:
        """Context manager that turns a failed save into SaveFailed.

        Orbax still lists the failed step, so the next save opens a new manager.
        """
        try:
            yield
        except BaseException as error:
            manager, self._manager = self._manager, None
            with contextlib.suppress(ValueError):
                _saving.remove(manager)
            for _ in range(2):  # the first call raises the error again, and closes nothing
                with contextlib.suppress(Exception):
                    if manager:
                        manager.close()  # else its threads could write into the next save
            if not isinstance(error, OSError | ValueError):  # tensorstore's errors are ValueErrors
                raise
            with contextlib.suppress(Exception), store.patience(0):  # the store may have failed
                self.steps()
            kept = f"; the steps {self._listed} are unchanged" if self._listed else ""
            reason, remedy = _reason(error, self.directory)
            raise SaveFailed(
                f"a checkpoint could not be written to {self.directory}: {reason}{kept}. {remedy}"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        """Opens orbax's manager, after `_tidy` has removed invalid steps."""
        orbax_patches.apply_patches()
        if multihost.rank() == 0 and (self._remote or self.directory.exists()):
            self._tidy()
        multihost.barrier("checkpoints")
        self._damaged.clear()
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(self._options.keep)]
        if self._options.keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(self._options.keep_every))
        if self._best:
            policies.append(_Best(self._score_of))
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=self._score if self._best else None,  # without it no metrics are stored
                cleanup_tmp_directories=not self._remote,  # there `_tidy` does it
                save_root_metadata=not self._remote,
                todelete_subdir=TRASH,
                temporary_path_class=_CommittedInPlace if self._remote else _Committed,
            ),
            item_names=("state", "metadata"),
            item_handlers=_one_transaction() if self._remote else None,
        )

    def _score_of(self, step: int, metrics: dict | None) -> float:
        """Returns the score of a step; orbax has no `metrics` of one before ``best`` was set."""
        if not metrics and step not in self._recorded:
            try:
                self._recorded[step] = reader.document_of(self.directory, step)["metrics"]
            except Exception as error:  # damage is reported when the step is restored
                if reader.cannot_read(error):
                    raise
        return self._score(metrics or self._recorded.get(step, {}))

    def _score(self, metrics: dict) -> float:
        named = self._named(metrics)
        return self._sign * named[self._best] if self._best in named else -math.inf

    @staticmethod
    def _named(metrics: dict) -> dict:
        """Returns metrics, also those of earlier versions, under their names of today."""
        return {schema.evaluated_metric(name): value for name, value in metrics.items()}

    def _tidy(self) -> None:
        """Removes interrupted saves, empty steps, trash; moves damaged steps to ``N.damaged``."""
        if self._remote:
            for step in steps.interrupted(self.directory):
                log.info("removing the interrupted save of step %d", step)
                objects.delete_all(self.directory / str(step), first=steps.MARKS)
        else:
            for path in list(self.directory.iterdir()):
                if path.name == TRASH:
                    path.rmtree()
                elif path.name.isdigit() and path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        for step, complete in steps.scan(self.directory).items():
            if complete and step not in self._damaged:
                continue
            there, aside = self.directory / str(step), self.directory / f"{step}.damaged"
            log.error("moving the damaged checkpoint of step %d to %s", step, aside)
            if self._remote:
                objects.move(there, aside, first=steps.MARKS)
                continue
            if aside.exists():
                aside.rmtree()
            there.rename(aside)


def _one_transaction() -> dict[str, ocp.PyTreeCheckpointHandler]:
    """Returns a handler that writes all arrays of a process as one file, and its index once.

    Orbax does so where the bytes under way have no limit. With one (its default), a few arrays are
    a file and rewrite the index, and a bucket allows one write of an object per second.
    """
    unlimited = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=None)
    return {"state": ocp.PyTreeCheckpointHandler(handler_impl=unlimited)}


def _reason(error: Exception, directory: epath.Path) -> tuple[str, str]:
    """Returns the cause of an error, and the remedy.

    The cause is short; tensorstore's own text names ten files and a spec.
    """
    failed = store.of_tensorstore(error, directory) or error
    if isinstance(failed, store.StoreFailed) and failed.remedy:
        return str(failed).removesuffix(f". {failed.remedy}"), failed.remedy
    if number := reader.os_error(error):
        reason = os.strerror(number)
    else:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return reason, "Remove the cause and run the same command again"


def _as_arrays(state: PyTree) -> dict[str, Any]:
    """Returns the leaves as arrays by path.

    Raises ValueError where JAX would change a dtype (NumPy's int64 without x64). Python numbers
    become NumPy arrays, because with several processes orbax rejects JAX arrays of one process.
    """
    flat, _ = reader.flatten(state)
    arrays = {}
    for path, leaf in flat.items():
        x = arrays[path] = leaf if isinstance(leaf, jax.Array) else np.asarray(jnp.asarray(leaf))
        if hasattr(leaf, "dtype") and leaf.dtype != x.dtype:
            raise ValueError(
                f"{path} is {leaf.dtype}, which JAX would turn into {x.dtype}: "
                f"cast it, or enable jax_enable_x64"
            )
    if not any(x.size for x in arrays.values()):
        raise ValueError("nothing to save: the state has no leaf with a number in it")
    return arrays
