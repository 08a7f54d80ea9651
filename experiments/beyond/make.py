# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.beyond.make

results.csv and shifts.csv are of one setting; grid.csv, warmup.csv, final.csv and final_shifts.csv
are of the protocol.
"""

import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
LAYOUTS = ("CCTT", "CCAA", "CCEE", "CMMT")
PAIRS = [(layout, "CCTT") for layout in LAYOUTS[1:]]
COMPARED = ("3", "4")  # pixels of a shift that has verdicts


def percent(found):
    return {seed: 100 * value for seed, value in found.items()}


def accuracies(rows):
    """{layout: {seed: per cent}} of the images as they are."""
    own = {n: [row for row in rows if row["model.layout"] == n] for n in LAYOUTS}
    return {n: percent(study.by_seed(found, "test/accuracy")) for n, found in own.items()}


def shifts(rows, column):
    """{shift: {layout: {seed: per cent}}} of the rows of `measure.py`."""
    steps = sorted({row["shift"] for row in rows}, key=int)
    return {
        step: {
            n: percent(study.by_seed(study.where(rows, layout=n, shift=step), column))
            for n in LAYOUTS
        }
        for step in steps
    }


def tuned():
    return protocol.state(HERE) == protocol.TUNED


def reported_shifts():
    """Returns the shifts of the reported runs."""
    return study.read(HERE / ("final_shifts.csv" if tuned() else "shifts.csv"))


def compared(rows, moved):
    """Returns the verdicts on every layout against CCTT, unmoved and moved."""
    found = study.compared(accuracies(rows), "test accuracy, points", PAIRS)
    for step, scores in shifts(moved, "accuracy").items():
        if step in COMPARED:
            found |= study.compared(scores, f"accuracy after {step} pixels, points", PAIRS)
    return found


def results(rows):
    """Returns the table of accuracy, difference from CCTT and setting, and the ranking."""
    found = accuracies(rows)
    body = []
    for n, own in found.items():
        apart = "" if n == "CCTT" else study.shown(verdicts.paired(own, found["CCTT"]))
        setting = study.setting([row for row in rows if row["model.layout"] == n])
        body.append((n, study.shown(list(own.values())), apart, *setting))
    head = ("layout", "test accuracy", "minus CCTT", "learning rate", "warm-up")
    return [*study.table(head, body), "", f"Best first: {study.ranked(found)}"]


def robustness(column):
    """Returns the table of a column of the shifts, and the ranking of each shift."""
    found = shifts(reported_shifts(), column)
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in LAYOUTS]
    if not found:
        return study.table(["layout", "moved"], [[n, "not run"] for n in LAYOUTS]), []
    heads = [f"{step} px" for step in found]
    ranking = [
        f"- {head}: {study.ranked(each)}" for head, each in zip(heads, found.values(), strict=True)
    ]
    return study.table(["layout", *heads], body), ranking


def tables(rows):
    reported = protocol.reported(HERE)
    moved, best = robustness("accuracy")
    agreement, _ = robustness("agreement")
    before = compared(rows, study.read(HERE / "shifts.csv"))
    after = compared(reported, reported_shifts())
    sides = [{name: each.side for name, each in found.items()} for found in (before, after)]
    one = [(n, study.shown(list(own.values()))) for n, own in accuracies(rows).items()]
    return {
        "vision": results(reported),
        "shifts": [*moved, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "verdict": study.sentences(after),
        "grid": study.grid(HERE, SWEEP.models_of(None), protocol.IMAGES, scale=100, digits=2),
        "one setting": study.table(("layout", "test accuracy"), one),
        "changed": study.changed(*sides) if tuned() else ["not run"],
    }


def draw(_):
    figure = study.figure(2)
    left, right = figure.subplots(1, 2)
    study.curves(left, LAYOUTS, shifts(reported_shifts(), "accuracy"))
    study.curves(right, LAYOUTS, shifts(reported_shifts(), "agreement"))
    left.set_title("test accuracy, %", fontsize=10)
    right.set_title("same answer as without the shift, %", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("pixels that the test images are moved by")
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
