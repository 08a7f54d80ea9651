# SPDX-License-Identifier: Apache-2.0
"""Tables and figure from the CSV files here: python -m experiments.beyond.make

results.csv and shifts.csv are of the images (`sweep.py`, `measure.py`), text_results.csv and
lengths.csv of the translations (`sweep_text.py`, `measure_text.py`). What is not there is not run.
"""

import pathlib

from experiments import study

HERE = pathlib.Path(__file__).parent
VISION = ("CCTT", "CCAA", "CCEE", "CMMT")
TEXT = {"SS": "Transformer", "MM": "MUSE", "TT": "relative", "AA": "adaptive", "EE": "equivariant"}
TEST, LOSS = "test/accuracy", "validation/loss"


def beside(file):
    """Rows of another CSV file of this study; none if it is not there yet."""
    return study.read(HERE / file) if (HERE / file).exists() else []


def chosen(rows, **values):
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def percent(found):
    return {seed: 100 * value for seed, value in found.items()}


def shifts(column):
    """{shift: {layout: {seed: per cent}}} of shifts.csv."""
    rows = beside("shifts.csv")
    steps = sorted({row["shift"] for row in rows}, key=int)
    return {
        step: {
            n: percent(study.by_seed(chosen(rows, layout=n, shift=step), column)) for n in VISION
        }
        for step in steps
    }


def vision(rows):
    """Accuracy by layout, and its difference from CCTT."""
    found = {
        n: percent(study.by_seed([r for r in rows if r["model.layout"] == n], TEST)) for n in VISION
    }
    base = found["CCTT"]
    lines = [
        [n, study.shown(list(found[n].values())), study.shown(study.paired(found[n], base))]
        for n in VISION
    ]
    lines[0][-1] = ""
    return study.table(["layout", "test accuracy", "minus CCTT"], lines), study.ranked(found)


def robustness(column):
    found = shifts(column)
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in VISION]
    if not found:
        return study.table(["layout", "moved"], [[n, "not run"] for n in VISION]), []
    heads = [f"{step} px" for step in found]
    ranking = [
        f"- {head}: {study.ranked(each)}" for head, each in zip(heads, found.values(), strict=True)
    ]
    return study.table(["layout", *heads], body), ranking


def text():
    """Validation loss by the length of the pairs that training saw."""
    rows = beside("text_results.csv")
    lengths = sorted({row["data.max_length"] for row in rows}, key=int, reverse=True)
    body = [
        [
            name,
            *(
                study.shown(
                    study.values(chosen(rows, **{"model.layout": n, "data.max_length": m}), LOSS), 3
                )
                for m in lengths
            ),
        ]
        for n, name in TEXT.items()
    ]
    heads = [f"loss, trained up to {m} tokens" for m in lengths] or ["loss"]
    if not lengths:
        body = [[name, "not run"] for name in TEXT.values()]
    return study.table(["model", *heads], body)


def tables(rows):
    accuracy, ranking = vision(rows)
    moved, best = robustness("accuracy")
    agreement, _ = robustness("agreement")
    return {
        "vision": [*accuracy, "", f"Best first: {ranking}"],
        "shifts": [*moved, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "text": text(),
    }


def draw(rows):
    del rows
    figure = study.figure(2)
    axes = figure.subplots(1, 2)
    for ax, column in zip(axes, ("accuracy", "agreement"), strict=True):
        found = shifts(column)
        for i, n in enumerate(VISION):
            measured = [
                (int(step), study.interval(list(each[n].values())))
                for step, each in found.items()
                if each[n]
            ]
            if measured:
                steps, numbers = zip(*measured, strict=True)
                means, halves = zip(*numbers, strict=True)
                at = [step + 0.06 * (i - 1.5) for step in steps]  # side by side
                ax.errorbar(at, means, halves, label=n, color=study.COLORS[i], capsize=2)
        ax.set(xlabel="pixels that the test images are moved by")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("test accuracy, %", fontsize=10)
    axes[1].set_title("same answer as without the shift, %", fontsize=10)
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
