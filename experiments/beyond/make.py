# SPDX-License-Identifier: Apache-2.0
"""results.csv, shifts.csv -> table.md, figure.png and the README's tables.

python -m experiments.beyond.make
"""

import pathlib

from experiments import study
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
LAYOUTS = ("CCTT", "CCAA", "CCEE", "CMMT")
TEST = "test/accuracy"


def percent(found):
    return {seed: 100 * value for seed, value in found.items()}


def shifts(column):
    """{shift: {layout: {seed: per cent}}} of shifts.csv."""
    rows = study.read(HERE / "shifts.csv")
    steps = sorted({row["shift"] for row in rows}, key=int)
    return {
        step: {
            n: percent(study.by_seed(study.where(rows, layout=n, shift=step), column))
            for n in LAYOUTS
        }
        for step in steps
    }


def accuracies(rows):
    """{layout: {seed: per cent}} of the images as they are."""
    return {
        n: percent(study.by_seed([r for r in rows if r["model.layout"] == n], TEST))
        for n in LAYOUTS
    }


def table(rows):
    """Accuracy by layout, and its difference from CCTT."""
    found = accuracies(rows)
    base = found["CCTT"]
    lines = [
        [n, study.shown(list(found[n].values())), study.shown(verdicts.paired(found[n], base))]
        for n in LAYOUTS
    ]
    lines[0][-1] = ""
    return study.table(["layout", "test accuracy", "minus CCTT"], lines), study.ranked(found)


def robustness(column):
    found = shifts(column)
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in LAYOUTS]
    if not found:
        return study.table(["layout", "moved"], [[n, "not run"] for n in LAYOUTS]), []
    heads = [f"{step} px" for step in found]
    ranking = [
        f"- {head}: {study.ranked(each)}" for head, each in zip(heads, found.values(), strict=True)
    ]
    return study.table(["layout", *heads], body), ranking


def tables(rows):
    accuracy, ranking = table(rows)
    moved, best = robustness("accuracy")
    agreement, _ = robustness("agreement")
    return {
        "vision": [*accuracy, "", f"Best first: {ranking}"],
        "shifts": [*moved, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "verdict": verdict_lines(rows),
    }


def verdict_lines(rows):
    """Returns the verdicts on every layout against CCTT, unmoved and moved."""
    pairs = [(n, "CCTT") for n in LAYOUTS[1:]]
    lines = study.verdict_lines(accuracies(rows), "test accuracy, points", pairs)
    for step, each in shifts("accuracy").items():
        if step in ("3", "4"):
            lines += study.verdict_lines(each, f"accuracy after {step} pixels, points", pairs)
    return lines


def draw(_):
    figure = study.figure(2)
    left, right = figure.subplots(1, 2)
    study.curves(left, LAYOUTS, shifts("accuracy"))
    study.curves(right, LAYOUTS, shifts("agreement"))
    left.set_title("test accuracy, %", fontsize=10)
    right.set_title("same answer as without the shift, %", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("pixels that the test images are moved by")
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
