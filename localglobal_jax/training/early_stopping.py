# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose metric no longer improves: ``eval.patience`` with ``checkpoint.best``."""

import math
from collections.abc import Mapping
from typing import Any

from localglobal_jax.config import schema

KEY = "early_stopping"  # of the state in a checkpoint's metadata


class EarlyStopping:
    """Counts the evaluations since the best value of ``checkpoint.best``.

    The metric is a sum over all hosts, so that every host counts alike. The state is a part of each
    checkpoint: a resumed run counts on, and a run that has stopped stays stopped unless
    ``eval.patience`` is raised or 0.

    Args:
      metadata: of the checkpoint that the run starts from. A state of another metric is not used.
    """

    def __init__(self, run: schema.Run, metadata: Mapping[str, Any]):
        self._patience, self._metric = run.eval.patience, run.checkpoint.best or ""
        self._best: float | None = None
        self._step, self._waited = 0, 0
        saved = metadata.get(KEY) or {}
        if saved and schema.evaluated_metric(saved["metric"]) == self._metric:
            self._best, self._step, self._waited = (saved[k] for k in ("best", "step", "waited"))

    @property
    def done(self) -> bool:
        """Returns whether the run has stopped."""
        return 0 < self._patience <= self._waited

    def add(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Takes the results of an evaluation, ``{split: {metric: value}}``. NaN never improves."""
        if not self._patience:
            return
        split, _, name = self._metric.removeprefix("-").rpartition("/")
        value = results[split][name]
        sign = -1 if self._metric.startswith("-") else 1
        known = self._best is not None
        if not math.isnan(value) and not (known and sign * value <= sign * (self._best or 0.0)):
            self._best, self._step, self._waited = value, step, 0
        else:
            self._waited += 1

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON for the metadata of a checkpoint; {} without patience."""
        if not self._patience:
            return {}
        state = {"metric": self._metric, "best": self._best, "step": self._step}
        return {KEY: {**state, "waited": self._waited}}

    def __str__(self) -> str:
        best = "no number yet" if self._best is None else f"{self._best:.5g} at step {self._step}"
        return (
            f"{self._metric.removeprefix('-')} has not improved in {self._waited} evaluations "
            f"(eval.patience={self._patience}); best: {best}"
        )


def has_stopped(run: schema.Run, metadata: Mapping[str, Any]) -> bool:
    """Returns whether `run` stopped early at the checkpoint of `metadata`."""
    return EarlyStopping(run, metadata).done
