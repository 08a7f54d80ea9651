# SPDX-License-Identifier: Apache-2.0
"""What the studies share: reading results.csv, means with intervals, tables, figures.

A study's ``make.py`` has ``tables(rows) -> {name: lines}`` and ``draw(rows) -> Figure``, and ends
in ``study.main(__file__, tables, draw)``; it reads committed CSV files, and nothing else.
"""

import csv
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

Row = Mapping[str, str]
Tables = Callable[[list[Row]], Mapping[str, list[str]]]

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")


def read(file: pathlib.Path) -> list[Row]:
    """Rows of a CSV file, of runs only the finished ones; none if there is no such file."""
    if not file.exists():
        return []
    with open(file, newline="") as opened:
        return [row for row in csv.DictReader(opened) if _finished(row)]


def _finished(row: Row) -> bool:
    """A row of `sweep --collect` says so; all others are."""
    whole = row.get("step", row.get("steps")) == row.get("steps")
    return row.get("state", "done") == "done" and whole


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of some columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def values(rows: Iterable[Row], column: str) -> list[float]:
    """The numbers of a column; a run that has none is left out."""
    return [float(row[column]) for row in rows if row.get(column)]


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns (mean, half of its 95 % confidence interval by Student's t).

    The interval of fewer than two numbers is nan, and so is the mean of none.
    """
    if len(numbers) < 2:
        return numbers[0] if numbers else math.nan, math.nan
    spread = statistics.stdev(numbers) / math.sqrt(len(numbers))
    t = round(float(stats.t.ppf(0.975, len(numbers) - 1)), 3)  # as the books' tables have it
    return statistics.mean(numbers), t * spread


def shown(numbers: Sequence[float], digits: int = 2) -> str:
    """E.g. ``30.31 ± 0.15``; a single run has no interval, and none at all is "not run"."""
    mean, half = interval(numbers)
    if math.isnan(mean):
        return "not run"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> list[float]:
    """Differences a - b of the runs with the same key (a seed): what the two share cancels."""
    return [a[key] - b[key] for key in a if key in b]


def by_seed(rows: Iterable[Row], column: str) -> dict[str, float]:
    """The number of every run that has one, by its seed."""
    return {row["seed"]: float(row[column]) for row in rows if row.get(column)}


def sign(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    """``>``, ``<`` or, where the 95 % interval of the paired differences holds 0, ``≈``."""
    mean, half = interval(paired(a, b))
    return "≈" if math.isnan(half) or abs(mean) <= half else ">" if mean > 0 else "<"


def ranked(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Best first, neighbours joined by their `sign`, e.g. ``CCTT > CTTT ≈ TTTT``."""
    measured = {name: found for name, found in scores.items() if found}
    names = sorted(measured, key=lambda name: -statistics.mean(measured[name].values()))
    text = "".join(f"{a} {sign(scores[a], scores[b])} " for a, b in itertools.pairwise(names))
    return text + names[-1] if len(names) > 1 else "not run"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def figure(columns: int = 1, rows: int = 1, *, width: float = 4.5, height: float = 3.2) -> Figure:
    """An empty figure; ``figure.subplots(rows, columns)`` gives its axes."""
    return Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")


def document(text: str, made: Mapping[str, list[str]]) -> str:
    """`text` with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    for name, lines in made.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(mark)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the README has no {mark.strip()} ... {end}")
        text = before + mark + "\n".join(lines) + "\n" + end + after
    return text


def save(figure: Figure, file: pathlib.Path) -> None:
    FigureCanvasAgg(figure).print_png(str(file))


def main(
    file: str,
    tables: Tables,
    draw: Callable[[list[Row]], Figure],
    out: pathlib.Path | None = None,
) -> None:
    """Writes table.md, figure.png, and the tables within README.md, beside `file` or in `out`."""
    here = pathlib.Path(file).parent
    out = out or here
    rows = read(here / "results.csv")
    made = tables(rows)
    (out / "table.md").write_text("\n\n".join("\n".join(lines) for lines in made.values()) + "\n")
    (out / "README.md").write_text(document((here / "README.md").read_text(), made))
    save(draw(rows), out / "figure.png")
