# SPDX-License-Identifier: Apache-2.0
"""Shared by the studies: reading results.csv, cells with intervals, verdicts, tables, figures.

A study's ``make.py`` has ``tables(rows) -> {name: lines}`` and ``draw(rows) -> Figure``, and ends
in ``study.main(__file__, tables, draw)``; it reads committed CSV files, and nothing else. Intervals
and verdicts are those of `localglobal_jax.training.reporting.verdicts`.
"""

import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import protocol
from localglobal_jax.training.reporting import verdicts

Row = Mapping[str, str]
Scores = Mapping[str, Mapping[str, float]]  # {model: {seed: number}}
Tables = Callable[[list[Row]], Mapping[str, list[str]]]

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")


def read(file: pathlib.Path) -> list[Row]:
    """Returns the rows of a CSV file, of runs only the finished ones; none without the file."""
    return [row for row in protocol.read(file) if _finished(row)]


def _finished(row: Row) -> bool:
    """Whether a row is of a finished run; rows that are not of `sweep --collect` are."""
    whole = row.get("step", row.get("steps")) == row.get("steps")
    return row.get("state", "done") == "done" and whole


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Returns the rows by the values of some columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def values(rows: Iterable[Row], column: str) -> list[float]:
    """Returns the numbers of a column; a run that has none is left out."""
    return [float(row[column]) for row in rows if row.get(column)]


def point(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns mean and half of the 95 % interval, as ``errorbar`` takes them."""
    found = verdicts.estimate(numbers)
    return found.mean, found.half


def shown(numbers: Sequence[float], digits: int = 2) -> str:
    """Returns e.g. ``30.31 ± 0.15``; without the interval for one number, "not run" for none."""
    mean, half = point(numbers)
    if math.isnan(mean):
        return "not run"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def where(rows: Iterable[Row], **values: str) -> list[Row]:
    """Returns the rows that have these values in these columns."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def by_seed(rows: Iterable[Row], column: str) -> dict[str, float]:
    """Returns the number of every run that has one, by its seed."""
    return {row["seed"]: float(row[column]) for row in rows if row.get(column)}


SIGNS = {"better": ">", "worse": "<", "undecided": "≈"}


def sign(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    """Returns ``>``, ``<`` or, if the 95 % interval of the paired differences holds 0, ``≈``."""
    return SIGNS[verdicts.verdict(a, b).side]


def ranked(scores: Scores) -> str:
    """Best first, neighbours joined by their `sign`, e.g. ``CCTT > CTTT ≈ TTTT``."""
    measured = {name: found for name, found in scores.items() if found}
    names = sorted(measured, key=lambda name: -statistics.mean(measured[name].values()))
    text = "".join(f"{a} {sign(scores[a], scores[b])} " for a, b in itertools.pairwise(names))
    return text + names[-1] if len(names) > 1 else "not run"


def compared(
    scores: Scores,
    measure: str,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    smaller_is_better: bool = False,
) -> dict[str, verdicts.Verdict]:
    """Returns the verdict on each pair of models by its name, "A against B, MEASURE".

    Args:
      measure: the metric with its unit, such as "BLEU".
      pairs: (model, baseline); None: every two models, in their order.
    """
    return {
        f"{ours} against {other}, {measure}": verdicts.verdict(
            scores[ours], scores[other], smaller_is_better=smaller_is_better
        )
        for ours, other in (itertools.combinations(scores, 2) if pairs is None else pairs)
    }


def sentences(
    found: Mapping[str, verdicts.Verdict],
    digits: int = 2,
    sides: tuple[str, str] = ("better", "worse"),
) -> list[str]:
    """Returns a sentence for each verdict: difference, interval, side.

    Args:
      sides: words for the two sides of a difference that is decided.
    """
    words = dict(zip(("better", "worse"), sides, strict=True))
    lines = []
    for name, verdict in found.items():
        if verdict.n < 2:
            lines.append(f"- {name}: no verdict ({verdict.n} pairs)")
            continue
        difference, low, high = (f"{x:+.{digits}f}" for x in verdict[1:4])
        lines.append(
            f"- {name}: {difference} ({low} to {high}, {verdict.n} pairs): "
            f"**{words.get(verdict.side, verdict.side)}**"
        )
    return lines


def verdict_lines(
    scores: Scores,
    measure: str,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    digits: int = 2,
    smaller_is_better: bool = False,
    sides: tuple[str, str] = ("better", "worse"),
) -> list[str]:
    """Returns the `sentences` of `compared`."""
    found = compared(scores, measure, pairs, smaller_is_better=smaller_is_better)
    return sentences(found, digits, sides)


def earlier(folder: pathlib.Path) -> dict[str, str]:
    """Returns the side of each verdict before the study was tuned, by its name: earlier.csv."""
    return {row["verdict"]: row["side"] for row in protocol.read(folder / "earlier.csv")}


def changed(folder: pathlib.Path, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns a sentence on the verdicts that tuning changed, and one for each.

    Args:
      folder: of the study; "not run" unless it is tuned.
      before, after: the side of each verdict by its name. Names that only one has are left out.
    """
    if protocol.state(folder) != protocol.TUNED:
        return ["not run"]
    shared = [name for name in after if name in before]
    lines = [
        f"- {name}: {before[name]}, tuned {after[name]}"
        for name in shared
        if before[name] != after[name]
    ]
    return [f"{len(lines)} of {len(shared)} verdicts differ.", *([""] if lines else []), *lines]


def commit_lines(folder: pathlib.Path) -> list[str]:
    """Returns the sentences that name the commits of a study's runs and of its earlier verdicts.

    They are read from the column ``commit`` of the CSV files. Measurements of runs have none.
    """
    of_runs: dict[str, list[str]] = {}
    without, verdicts_of, measured = [], list[str](), set[str]()
    names = sorted(file.stem for file in folder.glob("*.csv"))
    for name in sorted(
        names,
        key=lambda n: protocol.STAGES.index(n) if n in protocol.STAGES else len(protocol.STAGES),
    ):
        rows = protocol.read(folder / f"{name}.csv")
        measured |= {row["name"] for row in rows if "name" in row}
        if name == "earlier":
            verdicts_of = _commits(rows)
        elif found := _commits(rows):
            of_runs[name] = found
        elif rows and "state" in rows[0]:
            without.append(f"{name}.csv")
    if other := protocol.RUNS_OF.get(folder.name):
        rows = [row for row in protocol.reported(folder.parent / other) if row["name"] in measured]
        of_runs |= {other: found} if (found := _commits(rows)) else {}
    lines = []
    if of_runs:
        parts = (f"{' and '.join(found)} ({name})" for name, found in of_runs.items())
        lines.append(f"Runs of commit {', '.join(parts)}.")
    if without:
        lines.append(
            f"The rows of {' and '.join(without)} name no commit: they were collected before rows "
            "had one."
        )
    if verdicts_of:
        lines.append(f"Earlier verdicts of commit {' and '.join(verdicts_of)}.")
    return lines


def _commits(rows: Iterable[Row]) -> list[str]:
    """Returns the commits of rows, cut to 7 digits, each once; "-dirty" stays."""
    found = (row.get("commit", "").partition("-") for row in rows)
    return list(dict.fromkeys(commit[:7] + dash + dirty for commit, dash, dirty in found if commit))


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def setting(rows: Sequence[Row], kind: protocol.Kind) -> list[str]:
    """Returns the cells of norm (if chosen), learning rate and warm-up of a model's runs."""
    if not rows or protocol.RATE not in rows[0]:
        return ["not chosen"] * (3 if kind.norms else 2)
    norm, rate, warmup = protocol.cell(rows[0])
    return [*([f"{norm}-norm"] if norm else []), f"{rate:g}", str(warmup)]


def grid(
    folder: pathlib.Path,
    models: Mapping[str, protocol.Overrides],
    kind: protocol.Kind,
    *,
    scale: float = 1,
    digits: int = 3,
) -> list[str]:
    """Returns the table of the choice: a line for each setting, a column for each model.

    Args:
      scale: factor of the metric, such as 100 for per cent.
    """
    rows = protocol.read(folder / "grid.csv") + protocol.read(folder / "warmup.csv")
    found = protocol.scores(rows, models, kind.metric)

    def score(model: str, cell: protocol.Cell) -> str:
        if cell not in found[model]:
            return ""
        number = found[model][cell]
        return "failed" if math.isnan(number) else f"{scale * number:.{digits}f}"

    body = [
        (*setting(own, kind), *(score(model, cell) for model in models))
        for cell, own in _by_cell(rows).items()
    ]
    head = (*(["norm"] if kind.norms else []), "learning rate", "warm-up", *models)
    return table(head, body or [("not run", *[""] * (len(head) - 1))])


def _by_cell(rows: Iterable[Row]) -> dict[protocol.Cell, list[Row]]:
    found: dict[protocol.Cell, list[Row]] = {}
    for row in rows:
        found.setdefault(protocol.cell(row), []).append(row)
    return found


def figure(columns: int = 1, rows: int = 1, *, width: float = 4.5, height: float = 3.2) -> Figure:
    """Returns an empty figure; ``figure.subplots(rows, columns)`` gives its axes."""
    return Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")


def curves(axes: Axes, names: Sequence[str], found: Mapping[str, Scores]) -> None:
    """Draws a line with 95 % intervals for each model over the keys of ``{key: scores}``."""
    for i, name in enumerate(names):
        measured = [
            (place + 0.06 * (i - 1.5), *point(list(scores[name].values())))  # side by side
            for place, scores in enumerate(found.values())
            if scores[name]
        ]
        if measured:
            places, means, halves = zip(*measured, strict=True)
            axes.errorbar(places, means, halves, label=name, color=COLORS[i], capsize=2)
    axes.set_xticks(range(len(found)), list(found))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def document(text: str, made: Mapping[str, list[str]]) -> str:
    """Returns `text` with new lines between each ``<!-- NAME -->`` and ``<!-- end -->``."""
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
    made = {"protocol": [*protocol.state_lines(here), *commit_lines(here)], **tables(rows)}
    (out / "table.md").write_text("\n\n".join("\n".join(lines) for lines in made.values()) + "\n")
    (out / "README.md").write_text(document((here / "README.md").read_text(), made))
    save(draw(rows), out / "figure.png")
