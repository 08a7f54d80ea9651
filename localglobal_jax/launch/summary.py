# SPDX-License-Identifier: Apache-2.0
"""Tables of a sweep: one line per run or per setting, from the rows of `status.read`. Pure."""

import ast
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localglobal_jax.config import validation
from localglobal_jax.launch import status
from localglobal_jax.training import metrics
from localglobal_jax.training.reporting import metrics_log, verdicts

FILES = {"": "csv", ".csv": "csv", ".md": "markdown", ".tex": "latex", ".json": "json"}
Row = Mapping[str, Any]  # of `status.read`
Record = dict[str, Any]  # a line of a table, by column
NOT_FINITE = ("nan", "inf", "-inf")  # as ``metrics.jsonl`` has them


class Metric:
    """A metric ``test/accuracy`` or ``-test/loss`` and its direction.

    Without the "-", smaller values of a loss, nll or perplexity are better all the same.
    """

    def __init__(self, given: str):
        self.name, self.smaller = metrics.direction(given)

    def last(self, row: Row) -> Any:
        """Returns the last value of a run, which may be "nan" or "inf"; None if it has none."""
        return row["extremes"].get(self.name, {}).get("last")

    def best(self, row: Row) -> tuple[Any, Any]:
        """Returns the best value of a run and its step; None if it has none."""
        found, which = row["extremes"].get(self.name, {}), "min" if self.smaller else "max"
        return found.get(which), found.get(f"{which}_at")


def metric(rows: Sequence[Row], asked: str | None, best: str | None, split: str | None) -> Metric:
    """Returns the metric `asked`, else `best` (``checkpoint.best``), else a usual one of `split`.

    Raises ValueError for a metric that no run has, if any run has metrics.
    """
    known = list(dict.fromkeys(name for row in rows for name in row["extremes"]))
    given = asked or best or ""
    if not given:
        usual = [f"{split}/{name}" for name in metrics.USUAL]
        given = next((name for name in usual if name in known), usual[-1])
    found = Metric(given)
    if asked and known and found.name not in known:
        raise validation.unknown("--metric", found.name, known)
    return found


def varying(rows: Sequence[Row]) -> list[str]:
    """Returns the fields whose values in force differ between runs; of one run, its overrides."""
    fields = list(rows[0]["settings"]) if rows else []
    different = [f for f in fields if len({repr(row["settings"][f]) for row in rows}) > 1]
    return different or fields


def runs(rows: Sequence[Row], of: Metric) -> list[Record]:
    """Returns one record per run: number, settings, last and best value, costs, state, reason."""
    fields = varying(rows)
    records = []
    for row in rows:
        best, at = of.best(row)
        records.append(
            {
                "run": row["index"],
                **{field: row["settings"][field] for field in fields},
                f"last {of.name}": of.last(row),
                f"best {of.name}": best,
                "at step": at,
                "steps": f"{row['step']}/{row['steps']}",
                "seconds": row["seconds"],
                "devices": row["devices"] or None,
                "disk": row["disk"],
                "state": row["state"],
                "reason": row["note"],
            }
        )
    return records


def groups(
    rows: Sequence[Row], of: Metric, by: Sequence[str], baseline: Sequence[str] = ()
) -> list[Record]:
    """Returns one record per setting of all fields but `by`, notes and tags; of its finished runs.

    Of the last value: n, mean, standard deviation and the 95 % interval; of the best, the mean.
    With a `baseline` (see `find`), also the paired difference to that setting over the values of
    `by` that both have, its interval and its side. Raises ValueError for a field that no run of the
    sweep overrides.
    """
    for field in by:
        if field not in rows[0]["settings"]:
            raise validation.unknown("field in --group:", field, rows[0]["settings"])
    kept = [f for f in varying(rows) if f not in by and f not in metrics_log.ABOUT]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr([row["settings"][f] for f in kept]), []).append(row)
    settings = {k: {f: members[0]["settings"][f] for f in kept} for k, members in found.items()}
    scores = {key: _scores(members, of, by) for key, members in found.items()}
    other = find(settings, found, baseline) if baseline else None
    records = []
    for key, members in found.items():
        last = verdicts.estimate(list(scores[key].values()))
        done = [row for row in members if row["state"] == "done"]
        best = [value for row in done if _is_number(value := of.best(row)[0])]
        record: Record = {
            **settings[key],
            "runs": f"{len(done)}/{len(members)}",
            "n": last.n,
            f"mean {of.name}": _number(last.mean),
            "sd": _number(last.sd),
            "low": _number(last.low),
            "high": _number(last.high),
            "mean of best": sum(best) / len(best) if best else None,
        }
        if other is not None:
            record |= _against(scores[key], scores[other], of, is_other=key == other)
        records.append(record)
    return records


def _against(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    of: Metric,
    *,
    is_other: bool,
) -> Record:
    found = verdicts.verdict(ours, theirs, smaller_is_better=of.smaller)
    if is_other:
        return dict.fromkeys(("pairs", "difference", "diff low", "diff high")) | {
            "side": "baseline"
        }
    return {
        "pairs": found.n,
        "difference": _number(found.difference),
        "diff low": _number(found.low),
        "diff high": _number(found.high),
        "side": found.side,
    }


def _scores(rows: Iterable[Row], of: Metric, by: Sequence[str]) -> dict[str, float]:
    """Returns the last value of every finished run that has one, by its values of `by`.

    Runs that differ only in notes and tags are no independent samples: it is their mean.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["state"] == "done" and _is_number(of.last(row)):
            found.setdefault(repr([row["settings"][f] for f in by]), []).append(of.last(row))
    return {key: sum(values) / len(values) for key, values in found.items()}


def find(
    settings: Mapping[str, Mapping[str, Any]],
    members: Mapping[str, Sequence[Row]],
    words: Sequence[str],
) -> str:
    """Returns the key of the setting that `words` name.

    A word is ``FIELD=VALUE``, or the name or the number of a run. Raises ValueError unless the
    words name exactly one setting.
    """
    asked = dict(word.partition("=")[::2] for word in words)
    if all("=" in word for word in words):
        fields = next(iter(settings.values())).keys()
        for field in asked.keys() - fields:
            raise validation.unknown("field in --baseline:", field, fields)
        found = [
            key
            for key, setting in settings.items()
            if all(_is_value(setting[f], text) for f, text in asked.items())
        ]
    else:
        names = {
            key: {name for row in rows for name in (row["name"], str(row["index"]))}
            for key, rows in members.items()
        }
        for word in words:
            if not any(word in each for each in names.values()):
                every = sorted(row["name"] for rows in members.values() for row in rows)
                raise ValueError(
                    f"--baseline {word}: no such run among {len(every)}, {every[0]} to "
                    f"{every[-1]}: give FIELD=VALUE, or the name or the number of a run"
                )
        found = [key for key, each in names.items() if not each.isdisjoint(words)]
    if len(found) != 1:
        shown = "; ".join(
            " ".join(f"{f}={_text(v)}" for f, v in s.items()) for s in settings.values()
        )
        raise ValueError(
            f"--baseline {' '.join(words)} names {len(found)} settings: name one of: {shown}"
        )
    return found[0]


def _is_value(value: Any, text: str) -> bool:
    """Returns whether `text` is `value`: as it is printed, or as Python writes it (8e-3)."""
    if _text(value) == text:
        return True
    try:
        read = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    read = tuple(read) if isinstance(read, list) else read
    value = tuple(value) if isinstance(value, list) else value
    return read == value and isinstance(read, bool) == isinstance(value, bool)


# ---------------------------------------------------------------------------- order and output


def ordered(records: Sequence[Record], by: str | None, top: int | None) -> list[Record]:
    """Returns the first `top` records by a column, ascending, or descending for ``-COLUMN``.

    A column may be named by its first word ("best", "mean"). "20/100" counts as 20. Records without
    a value, or with "nan" or "inf", come last.
    """
    found = list(records)
    if by and found:
        name, columns = by.removeprefix("-"), list(found[0])
        match = [c for c in columns if c == name] or [c for c in columns if c.split()[0] == name]
        if not match:
            raise validation.unknown("column in --sort:", name, columns)

        def has(record: Record) -> bool:
            return record[match[0]] not in (None, "", *NOT_FINITE)

        def key(record: Record) -> tuple[bool, Any]:
            value = record[match[0]]
            if part := re.fullmatch(r"(\d+)/\d+", str(value)):
                return True, int(part[1])
            return (True, value) if _is_number(value) else (False, str(value))

        some = sorted(filter(has, found), key=key, reverse=by.startswith("-"))
        found = some + [record for record in found if not has(record)]
    return found[:top]


def shown(records: Sequence[Record], form: str) -> str:
    """Returns the records as text, Markdown, LaTeX, CSV or JSON (exact numbers in the last two)."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    if form == "json":
        return json.dumps(list(records), default=str)
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().rstrip("\n")
    columns = [c for c in columns if any(record.get(c) not in (None, "") for record in records)]
    cells = [[_cell(c, record.get(c)) for c in columns] for record in records]
    right = [
        all(_is_number(v := record.get(c)) or v in (None, "", *NOT_FINITE) for record in records)
        or c in ("steps", "runs")
        for c in columns
    ]
    return {"text": _plain, "markdown": _markdown, "latex": _latex}[form](columns, cells, right)


def _plain(columns: list[str], cells: list[list[str]], right: list[bool]) -> str:
    lines = [columns, *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _markdown(columns: list[str], cells: list[list[str]], right: list[bool]) -> str:
    marks = ["---:" if flush else "---" for flush in right]
    safe = [[text.replace("|", "\\|") for text in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, marks, *safe))


def _latex(columns: list[str], cells: list[list[str]], right: list[bool]) -> str:
    def line(texts: list[str]) -> str:
        return " & ".join(_escaped(text) for text in texts) + r" \\"

    layout = "".join("r" if flush else "l" for flush in right)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{layout}}}",
            r"\hline",
            line(columns),
            r"\hline",
            *map(line, cells),
            r"\hline",
            r"\end{tabular}",
        ]
    )


LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # which is an option after the end of a line
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "seconds":
        return status.duration(value)
    if column == "disk":
        return size(value)
    if _is_number(value) and isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(_text(value).splitlines())


def size(count: float) -> str:
    """Returns a number of bytes for people, in decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
