# SPDX-License-Identifier: Apache-2.0
"""results.csv, grid.csv, warmup.csv, final.csv -> table.md, figure.png and the README's tables.

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
METRICS = (("BLEU", "test/bleu", 2), ("chrF", "test/chrf", 2), ("loss", "test/nll", 3))
COMPARED = (METRICS[0], METRICS[2])


def runs(rows):
    """{model: {seed: row}} of the runs that are done."""
    named = [(model_name(row["model.layout"], row["model.blocks.M.windows"]), row) for row in rows]
    return {model: {row["seed"]: row for name, row in named if name == model} for model in MODELS}


def numbers(own, column):
    return {seed: float(row[column]) for seed, row in own.items()}


def compared(rows):
    """Returns the verdicts on every two models, and their sentences."""
    verdicts, lines = {}, []
    for name, column, digits in COMPARED:
        scores = {model: numbers(own, column) for model, own in runs(rows).items()}
        found = study.compared(scores, name, smaller_is_better=name == "loss")
        verdicts |= found
        lines += study.sentences(found, digits)
    return verdicts, lines


def tables(rows):
    tuned = protocol.reported(HERE)
    (earlier, _), (found, lines) = compared(rows), compared(tuned)
    before, after = ({name: v.side for name, v in each.items()} for each in (earlier, found))
    ours = [name for name, *_ in METRICS]
    papers = ("IWSLT14 De-En", "WMT14 En-De", "En-Fr")
    return {
        "results": study.table(
            ("model", *papers, "norm", "learning rate", "warm-up", *ours),
            [
                (m, *PAPER[m], *study.setting([*own.values()], protocol.TEXT), *scores(own))
                for m, own in runs(tuned).items()
            ],
        ),
        "verdict": lines,
        "grid": study.grid(HERE, SWEEP.models("laptop"), protocol.TEXT),
        "one setting": study.table(
            ("model", *ours), [(m, *scores(own)) for m, own in runs(rows).items()]
        ),
        "changed": study.changed(HERE, before, after),
    }


def scores(own):
    """Returns the cells of the metrics of a model's runs."""
    return [study.shown(list(numbers(own, c).values()), digits) for _, c, digits in METRICS]


def draw(_):
    """Plots every reported run's BLEU, and BLEU by words of the source."""
    figure = study.figure(2, 1)
    scores, lengths = figure.subplots(1, 2)
    scores.set(xticks=range(len(MODELS)), ylabel="BLEU, a dot for each seed")
    scores.set_xticklabels(MODELS, fontsize=8)
    lengths.set(xticks=range(len(BUCKETS)), xlabel="words of the source", ylabel="BLEU")
    lengths.set_xticklabels(BUCKETS, fontsize=8)
    for place, (model, own) in enumerate(runs(protocol.reported(HERE)).items()):
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
