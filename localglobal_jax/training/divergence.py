# SPDX-License-Identifier: Apache-2.0
"""Are the numbers still numbers? What went wrong is found at the step where it did, and named.

Every train step says, of its loss and of the gradient of every parameter, whether it is finite. The
host reads that one step late, while the device is busy with the next. No state that such a step
has touched becomes a checkpoint: the run ends with exit code 3 and leaves ``diverged.json``, or, if
``optim.skip_nonfinite`` allows it, the step has changed nothing and the run goes on.
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
SHOWN = 5  # names of parameters in a message; the file has all
CURES = (
    "Go on with --config.optim.skip_nonfinite=N, or start in another --workdir with a lower "
    "optim.learning_rate, a longer warm-up or optim.clip_norm"
)
log = logging.getLogger(__name__)


class Diverged(Exception):
    """A loss or a gradient is not finite (exit code 3)."""


class Outcome(NamedTuple):
    """What a train step says of itself."""

    metrics: Sums
    finite: Bool[Array, " parts"]  # of the loss, and of the gradient of every parameter


def squares(gradient: PyTree) -> Float[Array, " leaves"]:
    """The squared norm of every leaf. Infinite too where only the square is beyond float32."""
    return jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)])


def finite(loss: Float[Array, ""], norms: Float[Array, " leaves"]) -> Bool[Array, " parts"]:
    """`Outcome.finite`, of the loss and of what `squares` gives."""
    return jnp.isfinite(jnp.concatenate([loss[None], norms]))


@jax.jit
def _finite_leaves(leaves: tuple[Array, ...]) -> list[Array]:
    """Of each: are all its numbers finite? Integers are."""
    return [jnp.isfinite(x).all() for x in leaves]


def wrong(parts: Bool[np.ndarray | Array, " parts"], params: PyTree) -> tuple[bool, list[str]]:
    """Is the loss not finite, and the gradients of which parameters are not?"""
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    bad = ~np.asarray(parts)
    return bool(bad[0]), [name for name, is_bad in zip(names, bad[1:], strict=True) if is_bad]


def in_words(loss: bool, leaves: list[str]) -> str:
    """E.g. ``"the loss and the gradients of 2 parameters (dense/kernel, dense/bias)"``."""
    shown = ", ".join(leaves[:SHOWN]) + (", ..." if len(leaves) > SHOWN else "")
    gradients = f"the gradients of {len(leaves)} parameters ({shown})" if leaves else ""
    return " and ".join(part for part in ("the loss" if loss else "", gradients) if part)


class DivergenceMonitor:
    """Looks at the outcome of every step; all hosts see the same and so do the same.

    Args:
      params: for their names; arrays or shapes.
      directory: where ``diverged.json`` goes, None for nowhere.
      start: the step of the checkpoint that the run begins from.
      skipped: steps skipped before it.
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
        """Takes the outcome of a step, still on the device, and looks at the one before.

        `records`: ``int [b]``, this host's part of the batch. Raises Diverged.
        """
        self.settle()
        self._pending = step, outcome, records

    def saving(self, step: int, state: PyTree) -> None:
        """Before `state` becomes the checkpoint of `step`. Raises Diverged if it must not.

        Statistics, or an update, may overflow where loss and gradient were still finite.
        """
        self.settle()
        where, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
        fine = jax.device_get(_finite_leaves(leaves))
        if not all(fine):
            names = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, is_fine in zip(where, fine, strict=True)
                if not is_fine
            ]
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            self._write({"step": step, "last_checkpoint": self._saved, "state": names})
            raise Diverged(
                f"{len(names)} arrays of the state ({shown}) are NaN or infinite after step "
                f"{step}, which is not saved; the checkpoint of step {self._saved} is kept. {CURES}"
            )
        self._saved = step
        if self._directory and multihost.rank() == 0:
            (self._directory / FILE).unlink(missing_ok=True)  # of an earlier end, now passed

    def settle(self) -> None:
        """Looks at what is left to look at. Raises Diverged."""
        if self._pending:
            (step, outcome, records), self._pending = self._pending, None
            parts, loss = jax.device_get((outcome.finite, outcome.metrics["loss"]))
            if not parts.all():
                self._bad(step, *wrong(parts, self._params), records)
            elif loss[1] and (typical := self._spikes.add(float(loss[0]) / float(loss[1]))):
                self._warn("loss spike at step %d: %s", step, typical)

    def line(self) -> dict[str, int]:
        """For the metrics: how many steps were skipped so far, if any may be."""
        return {"skipped": self.skipped} if self._allowed else {}

    def _bad(self, step: int, loss: bool, leaves: list[str], records: np.ndarray) -> None:
        what = in_words(loss, leaves)
        if self.skipped < self._allowed:
            self.skipped += 1
            self._warn(
                "step %d changed nothing (%d of at most %d to skip): %s became NaN or infinite",
                *(step, self.skipped, self._allowed, what),
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
            f"{what} became NaN or infinite at step {step}, {step - self._saved} after the "
            f"checkpoint of step {self._saved}, which is kept. The batch's {len(batch)} records "
            f"are in {FILE}; --replay {step} computes this step again and says more. {CURES}"
        )

    def _write(self, found: dict[str, Any]) -> None:
        if self._directory and multihost.rank() == 0:
            try:
                write_atomically(self._directory / FILE, json.dumps(found, indent=1) + "\n")
            except OSError as error:  # divergence is the error to tell
                log.error("%s could not be written: %s", FILE, error)

    def _warn(self, text: str, *values: Any) -> None:
        if multihost.rank() == 0:
            log.warning(text, *values)


class LossSpikeDetector:
    """Notices a loss far above the typical ones: a moving mean and mean deviation, no state kept.

    A spike is more than `far` deviations above the mean; it counts for the averages as that much,
    so that a plateau stops being one. Only the first of several in a row is told.
    """

    def __init__(self, far: float = 10.0, settled: int = 50):
        self._far, self._settled = far, settled
        self._count, self._mean, self._deviation, self._in_spike = 0, 0.0, 0.0, False

    def add(self, loss: float) -> str:
        """What to tell, or nothing."""
        limit = self._mean + self._far * self._deviation
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
    """What a replay found, in lines for people."""
    lines = [
        f"step {found['step']}, computed from the checkpoint of step {found['from']}: loss "
        f"{found['loss']:.6g}, gradient norm {found['gradient_norm']:.6g}"
    ]
    what = in_words(not math.isfinite(found["loss"]), found["parameters"])
    lines.append(f"{what} became NaN or infinite" if what else "all of it is finite")
    lines.append(f"records of the batch: {', '.join(map(str, found['records']))}")
    if found["inputs"]:
        lines.append(f"inputs that are not finite: {', '.join(found['inputs'])}")
    if found["alone"] is not None:
        alone = ", ".join(map(str, found["alone"])) or "none, only several together"
        alone = "every one" if found["alone"] == found["records"] else alone
        lines.append(f"records that do it in a batch of nothing else: {alone}")
    return "\n".join(lines)
