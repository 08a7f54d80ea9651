# SPDX-License-Identifier: Apache-2.0
"""Draws results.csv -> table.md, figure.png and the README's tables.

python -m experiments.lohelp.make [runs/lohelp]     with the folder of `run.sh`: collects first
"""

import csv
import json
import pathlib
import sys

from experiments import study

HERE = pathlib.Path(__file__).parent
BUCKETS = ("1-15", "16-30", "31-45", "46-60")  # 2,252 of 2,285; beyond, each has 19 or fewer
NAMES = {"muse": "MUSE", "transformer": "Transformer"}
SCORES = {"bleu": "BLEU", "chrf": "chrF", "perplexity": "perplexity"}
COLUMNS = {**SCORES, **{f"bleu_{bucket}": f"BLEU, words {bucket}" for bucket in BUCKETS}}


def collect(runs: pathlib.Path) -> None:
    """Writes results.csv: the output of `localglobal evaluate` for the test split of every run."""
    rows = []
    for file in sorted(runs.glob("*_*.test.json")):
        model, seed = file.name.removesuffix(".test.json").split("_")
        found = json.loads(file.read_text())
        values = {name: f"{found['test'][name]:.4f}" for name in COLUMNS if name in found["test"]}
        rows.append({"model": model, "seed": seed, "steps": found["step"], **values})
    with open(HERE / "results.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, ("model", "seed", "steps", *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def scores(rows, column):
    """{model: {seed: number}} of a column."""
    return {
        name: study.by_seed([row for row in rows if row["model"] == key], column)
        for key, name in NAMES.items()
    }


def tables(rows):
    body, lines = [], []
    for column, label in COLUMNS.items():
        found = scores(rows, column)
        body.append([label, *(study.shown(list(each.values())) for each in found.values())])
        lines += study.verdict_lines(found, label, smaller_is_better=column == "perplexity")
    return {"results": study.table(["", *NAMES.values()], body), "verdict": lines}


def draw(rows):
    """Plots BLEU by words of the source."""
    figure = study.figure(width=6)
    axes = figure.subplots()
    for offset, name, color in zip((-0.2, 0.2), NAMES.values(), study.COLORS, strict=False):
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
    if len(sys.argv) > 1:
        collect(pathlib.Path(sys.argv[1]))
    study.main(__file__, tables, draw)
