# SPDX-License-Identifier: Apache-2.0
"""The geometry of the charts: paths, dots and ticks of metrics over steps, in pixels."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from localglobal_jax.training.reporting.html.facts import Run, number, size

# Size of a chart, and the edges of its plot area, in pixels
BOX = {"width": 360, "height": 200, "left": 52, "right": 342, "top": 8, "bottom": 178}
TICKS = 6  # values of a field that are written below its chart
MOST_POINTS, MARKED = 600, 40  # points of a curve; up to MARKED points get a dot each
COLORS, DASHES = 8, 4  # defined by page.css
FIRST = ("loss", "accuracy", "bleu", "chrf")  # charts that come first
HIDDEN = re.compile(
    r"step|split|count|seconds_left|compile_seconds|bleu_.*"
)  # metrics without a chart


class Curve(NamedTuple):
    """A line of a chart, in pixels, with a label.

    `band`: the outline of the range of several runs; "" without one.
    """

    color: int
    dash: int
    path: str
    dots: list[tuple[float, float, str]]
    label: str
    band: str = ""


class Chart(NamedTuple):
    """The chart of one metric over the steps, for all runs and splits that have it."""

    name: str
    splits: list[tuple[str, int]]  # and their dashes
    curves: list[Curve]
    x: list[tuple[float, str]]  # ticks
    y: list[tuple[float, str]]


class Scatter(NamedTuple):
    """The chart of a metric against a field of the config; `keys`: names and colours of lines."""

    name: str
    keys: list[tuple[str, int]]
    curves: list[Curve]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]


Groups = Sequence[tuple[str, Sequence[Run]]]  # name and members; each is one curve per split


def charts(runs: Sequence[Run], groups: Groups | None = None) -> list[Chart]:
    """Returns one chart for every metric of the runs.

    With `groups`, the curve of a group is the mean of its runs, and a band is their range.
    """
    groups = [(run.name, [run]) for run in runs] if groups is None else groups
    names = dict.fromkeys(
        name
        for run in runs
        for line in run.metrics
        for name, value in line.items()
        if not HIDDEN.fullmatch(name) and number(value) is not None
    )
    order = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    splits = list(dict.fromkeys(line["split"] for run in runs for line in run.metrics))
    return [_chart(name, groups, splits) for name in order]


def _chart(name: str, groups: Groups, splits: list[str]) -> Chart:
    # (group, split) -> step -> the values of the runs
    series: dict[tuple[int, int], dict[int, list[float]]] = {}
    for which, (_, members) in enumerate(groups):
        for line in itertools.chain(*(run.metrics for run in members)):
            if (value := number(line.get(name))) is not None:
                key = which, splits.index(line["split"])
                series.setdefault(key, {}).setdefault(line["step"], []).append(value)
    form = size if name == "memory_bytes" else "{:,.6g}".format
    every = [(step, v) for steps in series.values() for step, found in steps.items() for v in found]
    x_ticks, to_x = _axis([0, *(x for x, _ in every)], BOX["left"], BOX["right"], whole=True)
    y_ticks, to_y = _axis([y for _, y in every], BOX["bottom"], BOX["top"], text=form)
    curves = []
    for (which, split), steps in series.items():
        kept = thinned(sorted((step, statistics.fmean(found)) for step, found in steps.items()))
        label = f"{groups[which][0]}, {splits[split]}"
        at = [(round(to_x(x), 1), round(to_y(y), 1)) for x, y in kept]
        dots = [
            (*place, f"{label}: {y:.5g} at step {x}{_range(steps[x])}")
            for place, (x, y) in zip(at, kept, strict=True)
        ]
        ends = f"{label}: {kept[0][1]:.4g} at step {kept[0][0]}, {kept[-1][1]:.4g} at step "
        edges = [(to_x(x), to_y(max(steps[x])), to_y(min(steps[x]))) for x, _ in kept]
        curves.append(
            Curve(
                which % COLORS,
                split % DASHES,
                _path(at),
                dots * (len(kept) <= MARKED),
                f"{ends}{kept[-1][0]}",
                _band(edges) if max(map(len, steps.values())) > 1 else "",
            )
        )
    used = {split for _, split in series}
    return Chart(name, [(splits[i], i % DASHES) for i in sorted(used)], curves, x_ticks, y_ticks)


def _range(found: Sequence[float]) -> str:
    """Returns the number and the range of several values, for a label; "" for one."""
    return f" (of {len(found)}: {min(found):.5g} to {max(found):.5g})" if len(found) > 1 else ""


def _path(at: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x},{y}" for x, y in at)


def _band(edges: Sequence[tuple[float, float, float]]) -> str:
    """Returns the outline of (x, upper y, lower y); a single place is a vertical line."""
    there = [(round(x, 1), round(top, 1)) for x, top, _ in edges]
    back = [(round(x, 1), round(bottom, 1)) for x, _, bottom in reversed(edges)]
    return _path([*there, *back]) + "Z"


def scatter(name: str, points: Sequence[tuple[Any, str, float, str]]) -> Scatter:
    """Returns the chart of a metric against a field, with one line of means per series.

    `points`: of every run the value of the field, the series, the metric and a label. Numbers are
    on an axis, logarithmic if they are positive and span a factor of 5 or more; anything else has a
    place each.
    """
    given: list[Any] = [value for value, *_ in points]
    is_number = all(number(v) is not None and not isinstance(v, bool) for v in given)
    distinct: list[Any] = sorted(set(given)) if is_number else list(dict.fromkeys(map(str, given)))
    logarithmic = is_number and distinct[0] > 0 and distinct[-1] / distinct[0] >= 5

    def place(value: Any) -> float:
        if not is_number:
            return distinct.index(str(value))
        return math.log(value) if logarithmic else float(value)

    margin = 24  # pixels on both sides
    low, high = min(map(place, given)), max(map(place, given))
    left, right = BOX["left"] + margin, BOX["right"] - margin

    def to_x(value: Any) -> float:
        share = (place(value) - low) / (high - low) if high > low else 0.5
        return round(left + (right - left) * share, 1)

    y_ticks, to_y = _axis([y for _, _, y, _ in points], BOX["bottom"], BOX["top"])
    keys = list(dict.fromkeys(series for _, series, _, _ in points))
    curves = []
    for which, key in enumerate(keys):
        mine = [(value, y, label) for value, series, y, label in points if series == key]
        dots = [(to_x(v), round(to_y(y), 1), label) for v, y, label in mine]
        means: dict[float, list[float]] = {}
        for value, y, _ in mine:
            means.setdefault(to_x(value), []).append(y)
        at = [(x, round(to_y(statistics.fmean(found)), 1)) for x, found in sorted(means.items())]
        said = f"{key}: " if key else ""
        label = said + ", ".join(f"{y:.4g} at {value}" for value, y, _ in mine)
        curves.append(Curve(which % COLORS, 0, _path(at), dots, label))
    shown = distinct if len(distinct) <= TICKS else distinct[:: math.ceil(len(distinct) / TICKS)]
    x_ticks = [(to_x(v), f"{v:.4g}" if isinstance(v, float) else str(v)) for v in shown]
    return Scatter(
        name, [(key, i % COLORS) for i, key in enumerate(keys)], curves, x_ticks, y_ticks
    )


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
    """Returns about `MOST_POINTS`: the last, and the extremes of every interval (spikes)."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
