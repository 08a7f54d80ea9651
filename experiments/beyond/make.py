# SPDX-License-Identifier: Apache-2.0
"""Tables and figure from the CSV files here: python -m experiments.beyond.make

results.csv and shifts.csv are of the images (`sweep.py`, `measure.py`), lengths.csv is of the
translations (`sweep_text.py`, `measure_text.py`). A missing file means that its runs are missing.
"""

import pathlib

from experiments import study
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
VISION = ("CCTT", "CCAA", "CCEE", "CMMT")
TEXT = ("Transformer", "MUSE", "relative", "A", "E")
TEST = "test/accuracy"


def beside(file):
    """Reads another CSV file of this study; empty if the file does not exist yet."""
    return study.read(HERE / file)


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


def accuracies(rows):
    """{layout: {seed: per cent}} of the images as they are."""
    return {
        n: percent(study.by_seed([r for r in rows if r["model.layout"] == n], TEST)) for n in VISION
    }


def vision(rows):
    """Accuracy by layout, and its difference from CCTT."""
    found = accuracies(rows)
    base = found["CCTT"]
    lines = [
        [n, study.shown(list(found[n].values())), study.shown(verdicts.paired(found[n], base))]
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
    """BLEU and loss on the whole test set, by the longest pairs that training saw."""
    rows = chosen(beside("lengths.csv"), tokens="all")
    lengths = sorted({row["max_length"] for row in rows}, key=int, reverse=True)
    cases = [(m, column) for m in lengths for column in ("bleu", "nll")]
    body = []
    for n in TEXT:
        cells = [
            study.shown(study.values(chosen(rows, model=n, max_length=m), column), 2)
            for m, column in cases
        ]
        body.append([n, *(cells or ["not run"])])
    names = {"bleu": "BLEU", "nll": "loss"}
    heads = [f"{names[column]}, trained up to {m}" for m, column in cases] or ["BLEU"]
    return study.table(["model", *heads], body)


def unseen():
    """{tokens: {model: {seed: loss of the model trained on short pairs minus that on long}}}."""
    rows = [row for row in beside("lengths.csv") if row["tokens"] != "all"]
    trained = sorted({row["max_length"] for row in rows}, key=int)
    if len(trained) < 2:
        return {}

    def losses(n, tokens, length):
        return study.by_seed(chosen(rows, model=n, tokens=tokens, max_length=length), "nll")

    found, first = {}, 1
    for tokens in sorted({row["tokens"] for row in rows}, key=int):
        group = found[f"{first}-{tokens}"] = {}
        first = int(tokens) + 1
        for n in TEXT:
            short, long = losses(n, tokens, trained[0]), losses(n, tokens, trained[-1])
            group[n] = {seed: short[seed] - long[seed] for seed in short if seed in long}
    return found


def lengths():
    found = unseen()
    heads = [f"{tokens} tokens" for tokens in found] or ["length"]
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in TEXT]
    return study.table(["model", *heads], body if found else [[n, "not run"] for n in TEXT])


def tables(rows):
    accuracy, ranking = vision(rows)
    moved, best = robustness("accuracy")
    agreement, _ = robustness("agreement")
    return {
        "vision": [*accuracy, "", f"Best first: {ranking}"],
        "shifts": [*moved, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "text": text(),
        "lengths": lengths(),
        "verdict": image_lines(rows),
        "verdict of the text": text_lines(),
    }


def image_lines(rows):
    """Returns the verdicts of the images: every layout against CCTT, unmoved and moved."""
    pairs = [(n, "CCTT") for n in VISION[1:]]
    lines = study.verdict_lines(accuracies(rows), "test accuracy, points", pairs)
    for step, each in shifts("accuracy").items():
        if step in ("3", "4"):
            lines += study.verdict_lines(each, f"accuracy after {step} pixels, points", pairs)
    return lines


def text_lines():
    """Returns the verdicts of the translations: loss, BLEU, and loss on unseen lengths."""
    rows = chosen(beside("lengths.csv"), tokens="all")
    longest = max((row["max_length"] for row in rows), key=int, default="")
    own = {n: chosen(rows, model=n, max_length=longest) for n in TEXT}
    pairs = [(n, "MUSE") for n in TEXT if n != "MUSE"] + [("A", "relative"), ("E", "relative")]
    lower = {"digits": 3, "smaller_is_better": True}
    lines = []
    for name, column, options in (("loss", "nll", lower), ("BLEU", "bleu", {})):
        scores = {n: study.by_seed(found, column) for n, found in own.items()}
        lines += study.verdict_lines(scores, name, pairs, **options)
    for tokens, each in list(unseen().items())[-1:]:
        name = f"loss added at {tokens} tokens by training on short pairs"
        both = [(n, other) for n in TEXT[2:] for other in TEXT[:2]]
        lines += study.verdict_lines(each, name, both, **lower)
    return lines


def draw(rows):
    del rows
    figure = study.figure(3)
    axes = figure.subplots(1, 3)
    lines(axes[0], VISION, shifts("accuracy"))
    lines(axes[1], VISION, shifts("agreement"))
    lines(axes[2], TEXT, unseen())
    axes[0].set_title("test accuracy, %", fontsize=10)
    axes[1].set_title("same answer as without the shift, %", fontsize=10)
    axes[2].set_title("loss added by having trained on short pairs only", fontsize=10)
    for ax in axes[:2]:
        ax.set_xlabel("pixels that the test images are moved by")
    axes[2].set_xlabel("tokens of the sentence")
    for ax in axes[::2]:
        if ax.lines:
            ax.legend(frameon=False, fontsize=8)
    return figure


def lines(ax, names, found):
    """A line for each name, over the keys of {key: {name: {seed: number}}}."""
    for i, n in enumerate(names):
        measured = [
            (j, study.point(list(each[n].values())))
            for j, each in enumerate(found.values())
            if each[n]
        ]
        if measured:
            places, numbers = zip(*measured, strict=True)
            means, halves = zip(*numbers, strict=True)
            at = [place + 0.06 * (i - 1.5) for place in places]  # side by side
            ax.errorbar(at, means, halves, label=n, color=study.COLORS[i], capsize=2)
    ax.set_xticks(range(len(found)), list(found))
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    study.main(__file__, tables, draw)
