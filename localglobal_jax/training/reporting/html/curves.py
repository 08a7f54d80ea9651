# SPDX-License-Identifier: Apache-2.0
"""The geometry of the charts: paths, dots and ticks of metrics over steps, in pixels."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from localglobal_jax.training.reporting.html.facts import Run, number, size

# Size of a chart, and the edges of its plot area, in pixels
BOX = {"width": 360, "height": 200, "left": 52, "right": 342, "top": 8, "bottom": 178}
MOST_POINTS, MARKED = 600, 40  # points of a curve; up to MARKED points get a dot each
COLORS, DASHES = 8, 4  # defined by page.css
FIRST = ("loss", "accuracy", "bleu", "chrf")  # charts that come first
HIDDEN = re.compile(
    r"step|split|count|seconds_left|compile_seconds|bleu_.*"
)  # metrics without a chart


class Curve(NamedTuple):
    """A line of a chart, in pixels, with a label."""

    color: int
    dash: int
    path: str
    dots: list[tuple[float, float, str]]
    label: str


class Chart(NamedTuple):
    """The chart of one metric over the steps, for all runs and splits that have it."""

    name: str
    splits: list[tuple[str, int]]  # and their dashes
    curves: list[Curve]
    x: list[tuple[float, str]]  # ticks
    y: list[tuple[float, str]]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns one chart for every metric of the runs."""
    names = dict.fromkeys(
        name
        for run in runs
        for line in run.metrics
        for name, value in line.items()
        if not HIDDEN.fullmatch(name) and number(value) is not None
    )
    order = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    splits = list(dict.fromkeys(line["split"] for run in runs for line in run.metrics))
    return [_chart(name, runs, splits) for name in order]


def _chart(name: str, runs: Sequence[Run], splits: list[str]) -> Chart:
    series: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for which, run in enumerate(runs):
        for line in run.metrics:
            if (value := number(line.get(name))) is not None:
                key = which, splits.index(line["split"])
                series.setdefault(key, []).append((line["step"], value))
    text = size if name == "memory_bytes" else "{:,.6g}".format
    every = list(itertools.chain(*series.values()))
    x_ticks, to_x = _axis([x for x, _ in every], BOX["left"], BOX["right"], whole=True)
    y_ticks, to_y = _axis([y for _, y in every], BOX["bottom"], BOX["top"], text=text)
    curves = []
    for (which, split), points in series.items():
        kept = thinned(sorted(points))
        label = f"{runs[which].name}, {splits[split]}"
        at = [(round(to_x(x), 1), round(to_y(y), 1)) for x, y in kept]
        dots = [
            (*place, f"{label}: {y:.5g} at step {x}")
            for place, (x, y) in zip(at, kept, strict=True)
        ]
        few = len(kept) <= MARKED
        path = "M" + "L".join(f"{x},{y}" for x, y in at)
        ends = f"{label}: {kept[0][1]:.4g} at step {kept[0][0]}, {kept[-1][1]:.4g} at step "
        curves.append(
            Curve(which % COLORS, split % DASHES, path, dots * few, f"{ends}{kept[-1][0]}")
        )
    used = {split for _, split in series}
    return Chart(name, [(splits[i], i % DASHES) for i in sorted(used)], curves, x_ticks, y_ticks)


def _axis(
    values: Iterable[float],
    start: float,
    stop: float,
    whole: bool = False,
    text: Callable[[float], str] = "{:,.6g}".format,
) -> Any:
    """Returns ticks (position, text), and the function from a value to its position."""
    low, high = min(values), max(values)
    if low == high and not whole:  # else the ticks would be rounding errors apart
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    ticks = MaxNLocator(4, integer=whole).tick_values(low, high)
    if not whole:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return start + (stop - start) * ((value - low) / span)

    return [(round(place(t), 1), text(t)) for t in ticks if low <= t <= high], place


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns at most `MOST_POINTS`: the extremes of every interval, so that spikes stay."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
