# SPDX-License-Identifier: Apache-2.0
"""results.csv, grid.csv and pilot.csv -> table.md, figure.png and the README's tables.

python -m experiments.muse_results.make
"""

import pathlib

from experiments import protocol, study
from experiments.text_runs import MODELS, model_name
from localglobal_jax.config import loading

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")

# IWSLT14 De-En, WMT14 En-De, WMT14 En-Fr: arXiv 1911.09483, tables 1 and 2
PAPER = {
    "Transformer": ("35.3", "28.4", "41.0"),
    "MUSE-simple": ("35.8", "29.8", "43.2"),
    "MUSE": ("36.3", "29.9", "43.5"),
    "DynamicConv": ("35.7", "29.4", "43.0"),
}
BUCKETS = ("1-15", "16-30", "31-45", "46-60")
METRICS = (("test/bleu", 2), ("test/chrf", 2), ("test/nll", 3))


def runs(rows):
    """{model: {seed: row}} of the runs that are done."""
    named = [(model_name(row["model.layout"], row["model.blocks.M.windows"]), row) for row in rows]
    return {model: {row["seed"]: row for name, row in named if name == model} for model in MODELS}


def numbers(own, column):
    return {seed: float(row[column]) for seed, row in own.items()}


def tables(rows):
    found = runs(rows)
    body = []
    for model, own in found.items():
        ours = [study.shown(list(numbers(own, c).values()), digits) for c, digits in METRICS]
        body.append((model, *PAPER[model], *ours))
    head = ("model", "IWSLT14 De-En", "WMT14 En-De", "En-Fr", "ours: BLEU", "chrF", "loss")
    lines = []
    for name, column, options in (
        ("BLEU", "test/bleu", {}),
        ("loss", "test/nll", {"digits": 3, "smaller_is_better": True}),
    ):
        scores = {model: numbers(own, column) for model, own in found.items()}
        lines += study.verdict_lines(scores, name, **options)
    return {
        "results": study.table(head, body),
        "verdict": lines,
        "other settings": study.table(*other_settings()),
        "grid": study.table(*grid()),
    }


def other_settings():
    """Returns head and body of the table of runs at other settings: test BLEU by seed."""
    rows = study.grouped(protocol.read(HERE / "pilot.csv"), "norm", "learning_rate", "model")
    body = [
        (model, f"{norm}-norm", rate, ", ".join(row["bleu"] for row in own))
        for (norm, rate, model), own in rows.items()
    ]
    return ("model", "norm", "learning rate", "BLEU, seeds 0, 1, 2 as far as run"), body


def grid():
    """Returns head and body of the table of the protocol's grid: the loss on validation."""
    rows = protocol.read(HERE / "grid.csv") + protocol.read(HERE / "warmup.csv")
    found = protocol.scores(rows, SWEEP.models("laptop"), protocol.TEXT.metric)
    cells = list(dict.fromkeys(protocol.cell(row) for row in rows))
    body = [
        (
            f"{cell.norm}-norm",
            f"{cell.rate:g}",
            str(cell.warmup),
            *(f"{found[m][cell]:.3f}" if cell in found[m] else "not run" for m in MODELS),
        )
        for cell in cells
    ]
    empty = [("not run", *[""] * (len(MODELS) + 2))]
    return ("norm", "learning rate", "warm-up", *MODELS), body or empty


def draw(rows):
    """Plots every run's BLEU, and BLEU by words of the source."""
    figure = study.figure(2, 1)
    scores, lengths = figure.subplots(1, 2)
    scores.set(xticks=range(len(MODELS)), ylabel="BLEU, a dot for each seed")
    scores.set_xticklabels(MODELS, fontsize=8)
    lengths.set(xticks=range(len(BUCKETS)), xlabel="words of the source", ylabel="BLEU")
    lengths.set_xticklabels(BUCKETS, fontsize=8)
    for place, (model, own) in enumerate(runs(rows).items()):
        if not own:
            continue
        color = study.COLORS[place]
        values = list(numbers(own, "test/bleu").values())
        scores.scatter([place] * len(values), values, color=color)
        groups = [study.point(list(numbers(own, f"test/bleu_{b}").values())) for b in BUCKETS]
        means, halves = zip(*groups, strict=True)
        lengths.errorbar(
            range(len(BUCKETS)), means, halves, color=color, label=model, marker="o", capsize=2
        )
        lengths.legend(fontsize=7, frameon=False)
    for axes in (scores, lengths):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
