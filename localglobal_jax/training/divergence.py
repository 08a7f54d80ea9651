# SPDX-License-Identifier: Apache-2.0
"""Detects non-finite losses and gradients at the step where they occur and names the parameters.

Every train step returns, for its loss and for the gradient of every parameter, whether it is
finite. The host reads these flags one step late, while the device computes the next step. A state
that such a step has changed never becomes a checkpoint: the run ends with exit code 3 and writes
``diverged.json``. If ``optim.skip_nonfinite`` allows it, the step changes nothing instead and the
run continues.
"""

import json
import logging
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from localglobal_jax.checkpoints.workdir import write_atomically
from localglobal_jax.config import schema
from localglobal_jax.parallel import multihost
from localglobal_jax.training.metrics import Sums

FILE = "diverged.json"
TINY = 1e-6  # a difference of losses that is none
SHOWN = 5  # names of parameters in a message; the file has all
CURES = (
    "Go on with --config.optim.skip_nonfinite=N, or start in another --workdir with a lower "
    "optim.learning_rate, a longer warm-up or optim.clip_norm"
)
log = logging.getLogger(__name__)


class Diverged(Exception):
    """A loss or a gradient is not finite (exit code 3)."""


class Outcome(NamedTuple):
    """The result of a train step beside the new state."""

    metrics: Sums
    finite: Bool[Array, " parts"]  # the loss, then the gradient of every parameter


def squares(gradient: PyTree) -> Float[Array, " leaves"]:
    """Returns the squared norm of every leaf; infinite too where only the square overflows."""
    return jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)])


def finite(loss: Float[Array, ""], norms: Float[Array, " leaves"]) -> Bool[Array, " parts"]:
    """Returns `Outcome.finite` of a loss and the squared norms of the gradient."""
    return jnp.isfinite(jnp.concatenate([loss[None], norms]))


@jax.jit
def _finite_leaves(leaves: tuple[Array, ...]) -> list[Array]:
    """Returns for each leaf whether all its numbers are finite; integers always are."""
    return [jnp.isfinite(x).all() for x in leaves]


def wrong(parts: Bool[np.ndarray | Array, " parts"], params: PyTree) -> tuple[bool, list[str]]:
    """Returns whether the loss is not finite, and the parameters with such a gradient."""
    bad = ~np.asarray(parts)
    names = zip(_paths(params), bad[1:], strict=True)
    return bool(bad[0]), [name for name, is_bad in names if is_bad]


def _paths(tree: PyTree) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def in_words(loss: bool, leaves: list[str]) -> str:
    """Returns e.g. ``"the loss and the gradients of 2 parameters (dense/kernel, dense/bias)"``."""
    gradients = f"the gradients of {len(leaves)} parameters ({_first(leaves)})" if leaves else ""
    return " and ".join(part for part in ("the loss" if loss else "", gradients) if part)


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


class DivergenceMonitor:
    """Checks the outcome of every step. All hosts see the same outcomes and raise the same errors.

    Args:
      params: arrays or shapes; their paths name the gradients.
      directory: where ``diverged.json`` is written; None: nowhere.
      start: the step of the checkpoint that the run starts from.
      skipped: the number of steps skipped before `start`.
    """

    def __init__(
        self,
        run: schema.Run,
        params: PyTree,
        directory: pathlib.Path | None,
        start: int = 0,
        skipped: int = 0,
    ):
        self.skipped = skipped
        self._allowed = run.optim.skip_nonfinite
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self._directory, self._saved, self._spikes = directory, start, LossSpikeDetector()
        self._pending: tuple[int, Outcome, np.ndarray] | None = None

    def add(self, step: int, outcome: Outcome, records: np.ndarray) -> None:
        """Takes the outcome of a step, still on the device, and checks the one before.

        `records`: ``int [b]``, this host's record numbers of the batch. Raises Diverged.
        """
        self.settle()
        self._pending = step, outcome, records

    def saving(self, step: int, state: PyTree) -> None:
        """Checks `state` before it becomes the checkpoint of `step`. Raises Diverged.

        Batch statistics, or an update, may overflow where loss and gradient are still finite.
        """
        self.settle()
        finite_leaves = jax.device_get(_finite_leaves(tuple(jax.tree.leaves(state))))
        if not all(finite_leaves):
            names = [p for p, ok in zip(_paths(state), finite_leaves, strict=True) if not ok]
            self._write({"step": step, "last_checkpoint": self._saved, "state": names})
            raise Diverged(
                f"{len(names)} state arrays ({_first(names)}) are NaN or infinite after step "
                f"{step}, which is not saved; {self._kept()}. {CURES}"
            )
        self._saved = step
        if self._directory and multihost.rank() == 0:
            (self._directory / FILE).unlink(missing_ok=True)  # written by an earlier attempt

    def settle(self) -> None:
        """Checks the pending outcome, if there is one. Raises Diverged."""
        if self._pending:
            (step, outcome, records), self._pending = self._pending, None
            parts, loss = jax.device_get((outcome.finite, outcome.metrics["loss"]))
            if not parts.all():
                self._bad(step, *wrong(parts, self._params), records)
            elif loss[1] and (typical := self._spikes.add(float(loss[0]) / float(loss[1]))):
                self._warn("loss spike at step %d: %s", step, typical)

    def line(self) -> dict[str, int]:
        """Returns the number of skipped steps for the metrics; {} if none may be skipped."""
        return {"skipped": self.skipped} if self._allowed else {}

    def _bad(self, step: int, loss: bool, leaves: list[str], records: np.ndarray) -> None:
        culprits = in_words(loss, leaves)
        if self.skipped < self._allowed:
            self.skipped += 1
            self._warn(
                "step %d changed nothing (%d of at most %d to skip): %s became NaN or infinite",
                *(step, self.skipped, self._allowed, culprits),
            )
            return
        batch = sorted({int(i) for i in multihost.all_gather(records)})
        found = {
            "step": step,
            "last_checkpoint": self._saved,
            "loss": loss,
            "parameters": leaves,
            "records": batch,
            "skipped": self.skipped,
        }
        self._write(found)
        raise Diverged(
            f"{culprits} became NaN or infinite at step {step}; {self._kept()}. "
            f"The batch's {len(batch)} records are in {FILE}; --replay {step} computes the step "
            f"again in detail. {CURES}"
        )

    def _kept(self) -> str:
        """Returns which checkpoint is left."""
        if not self._saved:
            return "no checkpoint had been saved"
        return f"the checkpoint of step {self._saved} is kept"

    def _write(self, found: dict[str, Any]) -> None:
        if self._directory and multihost.rank() == 0:
            try:
                write_atomically(self._directory / FILE, json.dumps(found, indent=1) + "\n")
            except OSError as error:  # the divergence must be reported
                log.error("%s could not be written: %s", FILE, error)

    def _warn(self, text: str, *values: Any) -> None:
        if multihost.rank() == 0:
            log.warning(text, *values)


class LossSpikeDetector:
    """Detects a loss far above the moving mean; its state is not saved in checkpoints.

    A spike is more than `far` mean deviations above the mean; of a loss that hardly moves, at least
    a thousandth of it (`least`). The averages take it as exactly that much, so that a new plateau
    stops counting as a spike. Only the first of consecutive spikes is reported. The first `settled`
    losses are never spikes.
    """

    def __init__(self, far: float = 10.0, settled: int = 50, least: float = 1e-3):
        self._far, self._settled, self._least = far, settled, least
        self._count, self._mean, self._deviation, self._in_spike = 0, 0.0, 0.0, False

    def add(self, loss: float) -> str:
        """Takes the next loss; returns a description of a new spike, else an empty string."""
        above = max(self._far * self._deviation, self._least * abs(self._mean), TINY)
        limit = self._mean + above
        before, known = self._in_spike, self._count >= self._settled
        self._in_spike = known and loss > limit
        text = f"{loss:.4g}, typical are {self._mean:.4g} +- {self._deviation:.2g}"
        capped = min(loss, limit) if known else loss
        self._count += 1
        rate = max(1 / self._count, 0.02)
        self._deviation += rate * (abs(capped - self._mean) - self._deviation)
        self._mean += rate * (capped - self._mean)
        return text if self._in_spike and not before else ""


def describe(found: dict[str, Any]) -> str:
    """Formats the result of `replay.replay` as text."""
    lines = [
        f"step {found['step']}, computed from the checkpoint of step {found['from']}: loss "
        f"{found['loss']:.6g}, gradient norm {found['gradient_norm']:.6g}"
    ]
    culprits = in_words(not math.isfinite(found["loss"]), found["parameters"])
    lines.append(f"{culprits} became NaN or infinite" if culprits else "everything is finite")
    lines.append(f"records of the batch: {', '.join(map(str, found['records']))}")
    if found["inputs"]:
        lines.append(f"inputs that are not finite: {', '.join(found['inputs'])}")
    if found["alone"] is not None:
        alone = ", ".join(map(str, found["alone"])) or "none, only several together"
        alone = "every one" if found["alone"] == found["records"] else alone
        lines.append(f"records that do so alone in a batch: {alone}")
    return "\n".join(lines)
