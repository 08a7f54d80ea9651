# SPDX-License-Identifier: Apache-2.0
"""The data of a page: one `Run` per workdir, and the formatting of its numbers."""

import base64
import dataclasses
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from localglobal_jax.training.reporting import run

TOTAL, BESIDE = "all parameters", "beside them: "  # rows of the table of parameters
MISTAKES = 10  # listed per confusion matrix
LARGEST = 1e30  # larger numbers are neither drawn nor averaged


class Picture(NamedTuple):
    """A PNG and its caption. `kind`: "plot" (dark on white) or "photo"."""

    png: bytes
    caption: str
    kind: str = "plot"

    @property
    def uri(self) -> str:
        """The PNG as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Confusion(NamedTuple):
    """A confusion matrix. ``counts[i, j]``: examples of class i predicted as class j."""

    split: str
    examples: str  # in words: "360 images", "the first 10,000 images"
    classes: list[str]
    counts: np.ndarray

    def mistakes(self) -> list[tuple[str, str, int]]:
        """Returns (class, predicted class, count), the most frequent first."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            (self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]
        ]

    def shade(self, i: int, j: int) -> int:
        """Returns the share of class i in tenths, for the colour of a cell; at least 1 if not 0."""
        share = self.counts[i, j] / max(1, self.counts[i].sum())
        return math.ceil(10 * share) if share < 1 else 10


class Sample(NamedTuple):
    """A sentence of the evaluation split, its translation and the cross-attention."""

    source: str
    reference: str
    translation: str
    attention: Picture


@dataclasses.dataclass(eq=False)
class Run:
    """The facts of one run. All fields but the first four may be missing."""

    name: str  # unique on a page
    workdir: str
    state: str  # "done", "step 30 of 100", ...
    config: Mapping[str, Any]
    step: int | None = None  # of the checkpoint
    notes: list[str] = dataclasses.field(
        default_factory=list
    )  # missing or damaged parts, and the reason
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    leaves: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    confusion: Confusion | None = None
    looks: list[Picture] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    page: tuple[str, str] | None = None  # about the config: its path in the checkout, and its URL
    attempts: list[dict[str, str]] = dataclasses.field(default_factory=list)
    reason: str = ""  # of a failure, in one line

    @property
    def finished(self) -> bool:
        """Returns whether the run has come to its end, also by early stopping."""
        return self.state.startswith("done")

    def last(self) -> dict[str, Any]:
        """Returns the last value of every metric of the model: ``{"test/accuracy": 0.99}``."""
        return {
            f"{line['split']}/{name}": value
            for line in self.metrics
            for name, value in run.model_results(line).items()
        }

    def speed(self) -> dict[str, float]:
        """Returns medians over the training lines; the sum of compile times, the maximal memory."""
        found: dict[str, list[float]] = {}
        for line in self.metrics:
            for name, value in line.items():
                of_it = line["split"] == "train" and run.of_the_machine(name)
                if of_it and name != "seconds_left" and number(value) is not None:
                    found.setdefault(name, []).append(float(value))
        medians = {name: statistics.median(values) for name, values in found.items()}
        for name, of in (("compile_seconds", sum), ("memory_bytes", max)):
            if name in found:
                medians[name] = of(found[name])
        return medians

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Returns (numbers, bytes) by submodule, in total, and of the other arrays."""
        groups: dict[str, tuple[int, int]] = {}
        rest: dict[str, tuple[int, int]] = {}
        total = (0, 0)
        for path, leaf in self.leaves.items():
            numbers = math.prod(leaf["shape"])
            size = numbers, numbers * _bytes(leaf["dtype"])
            kind, *parts = path.split("/")
            if kind == "variables" and parts[0] == "params":
                name = "/".join(parts[1:-1][:2]) or parts[-1]
                groups[name] = _plus(groups.get(name), size)
                total = _plus(total, size)
            elif kind != "step":
                name = parts[0] if kind == "variables" else kind
                rest[name] = _plus(rest.get(name), size)
        if not groups:
            return {}
        saved = {f"{BESIDE}{name}": size for name, size in rest.items()}
        return {**groups, TOTAL: total, **saved}


def _plus(a: tuple[int, int] | None, b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0], a[1] + b[1]) if a else b


def _bytes(dtype: str) -> int:
    """Returns the bytes of a number of a dtype like "float32", "bool", "int4" (one byte)."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def number(value: Any) -> float | None:
    """Returns a float that can be drawn; None for all else, such as "nan" in a metrics file."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < LARGEST and not isinstance(value, str) else None


def shown(value: Any) -> str:
    """Formats a number with few digits, anything else as text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"


def size(count: float) -> str:
    """Formats a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
