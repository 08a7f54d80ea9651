# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.coatnet_layouts.make

results.csv is of one setting; grid.csv, warmup.csv and final.csv are of the protocol.
"""

import itertools
import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
MODELS = SWEEP.models_of(None)
NAMES = tuple(MODELS)
PARTS = {"train[:1%]": "1 %", "train[:10%]": "10 %", "train": "100 %"}
# where the 600 training images that are looked at were all trained on, again and again
REPEATED = ("train[:1%]", "train[:10%]")
IMAGES = {"train[:1%]": 600, "train[:10%]": 6_000, "train": 60_000}
SEEN, TEST, LOSS = "train[:1%]/accuracy", "test/accuracy", "train/loss"
# The paper's two rankings, as groups of equals, best first; it has no TTTT
PAPER = {
    "generalisation": (("CCCC", "CCCT"), ("CCTT",), ("CTTT",), ("ViT-rel",)),
    "capacity": (("CCTT", "CTTT"), ("ViT-rel",), ("CCCT",), ("CCCC",)),
}
WRITTEN = {
    "generalisation": "CCCC ≈ CCCT ≥ CCTT > CTTT ≫ ViT-rel",
    "capacity": "CCTT ≈ CTTT > ViT-rel > CCCT > CCCC",
}


def of_layout(rows, layout):
    return [row for row in rows if protocol.model_of(row, MODELS) == layout]


def chosen(rows, layout, part):
    return study.where(of_layout(rows, layout), **{"data.train_split": part})


def percent(rows, column):
    return study.shown([100 * value for value in study.values(rows, column)])


def gaps(rows):
    """Returns training accuracy minus test accuracy of every run, in points."""
    seen, test = study.by_seed(rows, SEEN), study.by_seed(rows, TEST)
    return [100 * value for value in verdicts.paired(seen, test)]


def scores(rows):
    """Returns the score of each ranking: {ranking: {layout: {seed: number}}}, larger is better."""
    small = {n: study.by_seed(chosen(rows, n, "train[:1%]"), TEST) for n in NAMES}
    loss = {n: study.by_seed(chosen(rows, n, "train"), LOSS) for n in NAMES}
    negative = {n: {seed: -value for seed, value in found.items()} for n, found in loss.items()}
    return {"generalisation": small, "capacity": negative}


def verdict(ranking, found):
    """Counts the pairs that the paper orders: those that agree, contradict, are undecided."""
    count = {">": 0, "<": 0, "≈": 0}
    for a, b in pairs(ranking):
        if found[a] and found[b]:
            count[study.sign(found[a], found[b])] += 1
    agree, against, open_ = count.values()
    return f"{agree} agree, {against} against, {open_} undecided"


def accuracy(rows):
    """Returns the table of test accuracy by part of the training set, and the training loss."""
    body = []
    for n in NAMES:
        cells = [percent(chosen(rows, n, part), TEST) for part in PARTS]
        loss = study.shown(study.values(chosen(rows, n, "train"), LOSS), 4)
        body.append([n, *cells, loss])
    heads = [f"test accuracy, {share}" for share in PARTS.values()]
    return study.table(["layout", *heads, "training loss, 100 %"], body)


def tables(one_setting):
    rows = protocol.reported(HERE)
    gap = [
        [
            n,
            percent(chosen(rows, n, "train[:1%]"), SEEN),
            *(study.shown(gaps(chosen(rows, n, part))) for part in REPEATED),
        ]
        for n in NAMES
    ]
    rankings = []
    for ranking, found in scores(rows).items():
        counted = verdict(ranking, found) if any(found.values()) else "not run"
        rankings.append([ranking, WRITTEN[ranking], study.ranked(found), counted])
    settings = [(n, *study.setting(of_layout(rows, n), protocol.IMAGES)) for n in NAMES]
    before, after = compared(one_setting), compared(rows)
    sides = [{n: v.side for each in found for n, v in each.items()} for found in (before, after)]
    return {
        "accuracy": accuracy(rows),
        "gap": study.table(
            ["layout", "training accuracy, 1 %", *(f"gap, {PARTS[p]}" for p in REPEATED)], gap
        ),
        "rankings": study.table(["", "the paper", "ours", "the paper's pairs"], rankings),
        "verdict": study.sentences(after[0]) + study.sentences(after[1], 3),
        "setting": study.table(("layout", "learning rate", "warm-up"), settings),
        "grid": study.grid(HERE, MODELS, protocol.IMAGES, scale=100, digits=2),
        "one setting": accuracy(one_setting),
        "changed": study.changed(HERE, *sides),
    }


def compared(rows):
    """Returns the verdicts on the pairs that the paper orders, by accuracy and by training loss.

    The paper's better layout is first.
    """
    small, loss = scores(rows).values()
    small = {n: {seed: 100 * value for seed, value in found.items()} for n, found in small.items()}
    loss = {n: {seed: -value for seed, value in found.items()} for n, found in loss.items()}
    return (
        study.compared(small, "accuracy at 1 %, points", pairs("generalisation")),
        study.compared(loss, "training loss at 100 %", pairs("capacity"), smaller_is_better=True),
    )


def pairs(ranking):
    """Returns the pairs of layouts that the paper orders, the better one first."""
    groups = itertools.combinations(PAPER[ranking], 2)
    return [pair for better, worse in groups for pair in itertools.product(better, worse)]


def draw(_):
    rows = protocol.reported(HERE)
    figure = study.figure(3)
    axes = figure.subplots(1, 3)
    for i, (n, color) in enumerate(zip(NAMES, study.COLORS, strict=False)):
        sizes, accuracy, gap = [], [], []
        for part, images in IMAGES.items():
            if found := study.values(chosen(rows, n, part), TEST):
                sizes.append(images * 1.05 ** (i - 2.5))  # side by side
                accuracy.append(study.point([100 * value for value in found]))
                if part in REPEATED:
                    gap.append(study.point(gaps(chosen(rows, n, part))))
        for ax, numbers in ((axes[0], accuracy), (axes[1], gap)):
            if numbers:
                means, halves = zip(*numbers, strict=True)
                ax.errorbar(sizes[: len(numbers)], means, halves, label=n, color=color, capsize=2)
        losses = study.values(chosen(rows, n, "train"), LOSS)
        if losses:
            mean, half = study.point(losses)
            axes[2].bar(n, mean, yerr=half, color=color, capsize=2)
    titles = ("test accuracy, %", "training minus test accuracy, points", "training loss, 100 %")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:2]:
        ax.set(xscale="log", xlabel="training images")
        ax.set_xticks(list(IMAGES.values()), [f"{n:,}" for n in IMAGES.values()])
        ax.minorticks_off()
        ax.set_xlim(450, 85_000)
    if axes[0].lines:
        axes[1].legend(frameon=False, fontsize=8)
        full = [row for row in rows if row["data.train_split"] == "train"]
        axes[2].set_ylim(bottom=0.9 * min(study.values(full, LOSS), default=0))  # a cut axis
    axes[2].tick_params(axis="x", rotation=30)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
