# SPDX-License-Identifier: Apache-2.0
"""results.csv, grid.csv, warmup.csv, final.csv -> table.md, figure.png and the README's tables.

python -m experiments.lohelp.make
"""

import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
BUCKETS = ("1-15", "16-30", "31-45", "46-60")  # 2,252 of 2,285; beyond, each has 19 or fewer
LAYOUTS = {"MUSE": "MM", "Transformer": "SS"}
SCORES = {"bleu": "BLEU", "chrf": "chrF", "perplexity": "perplexity"}
COLUMNS = {**SCORES, **{f"bleu_{bucket}": f"BLEU, words {bucket}" for bucket in BUCKETS}}


def scores(rows, column):
    """{model: {seed: number}} of a column."""
    return {
        name: study.by_seed([r for r in rows if r["model.layout"] == layout], f"test/{column}")
        for name, layout in LAYOUTS.items()
    }


def compared(rows):
    """Returns the verdicts on MUSE against the Transformer, by every score."""
    found = {}
    for column, label in COLUMNS.items():
        smaller = column == "perplexity"
        found |= study.compared(scores(rows, column), label, smaller_is_better=smaller)
    return found


def tables(rows):
    tuned = protocol.reported(HERE)
    before, after = ({n: v.side for n, v in compared(r).items()} for r in (rows, tuned))
    body = [
        [label, *(study.shown(list(each.values())) for each in scores(tuned, column).values())]
        for column, label in COLUMNS.items()
    ]
    settings = [
        (name, *study.setting([r for r in tuned if r["model.layout"] == layout], protocol.TEXT))
        for name, layout in LAYOUTS.items()
    ]
    return {
        "results": study.table(["", *LAYOUTS], body),
        "setting": study.table(("model", "norm", "learning rate", "warm-up"), settings),
        "verdict": study.sentences(compared(tuned)),
        "changed": study.changed(HERE, before, after),
        "grid": study.grid(HERE, SWEEP.models_of(None), protocol.TEXT),
    }


def draw(_):
    """Plots the reported runs' BLEU by words of the source."""
    rows = protocol.reported(HERE)
    figure = study.figure(width=6)
    axes = figure.subplots()
    for offset, name, color in zip((-0.2, 0.2), LAYOUTS, study.COLORS, strict=False):
        points = [
            study.point(list(scores(rows, f"bleu_{bucket}")[name].values())) for bucket in BUCKETS
        ]
        means, halves = zip(*points, strict=True)
        places = [place + offset for place in range(len(BUCKETS))]
        axes.bar(places, means, 0.4, yerr=halves, capsize=2, label=name, color=color)
    axes.set(xticks=range(len(BUCKETS)), xticklabels=BUCKETS)
    axes.set(xlabel="words of the source", ylabel="BLEU, mean of the seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
