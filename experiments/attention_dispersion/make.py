# SPDX-License-Identifier: Apache-2.0
"""Draws the CSVs of `measure.py` -> table.md, figure.png and the README's tables.

python -m experiments.attention_dispersion.make
"""

import pathlib
import statistics

import numpy as np

from experiments import study
from experiments.text_runs import MODELS
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SHOWN = ("8", "24", "48", "96")  # the last length of a bucket
ATTENTIVE = MODELS[:3]  # DynamicConv has no self-attention


def by_seed(rows, column):
    """Returns the mean over heads, for each seed."""
    return [
        statistics.mean(study.values(own, column)) for own in study.grouped(rows, "seed").values()
    ]


def of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def layers(rows):
    return sorted({row["layer"] for row in rows}) or ["1", "2", "3"]


def table(rows, part):
    head = ["model, layer", *(f"entropy, {n}" for n in SHOWN), *(f"largest, {n}" for n in SHOWN)]
    body = []
    for model in ATTENTIVE:
        for layer in layers(rows):
            own = of(rows, model=model, part=part, layer=layer)
            cells = [
                study.shown(by_seed(of(own, tokens=n), column))
                for column in ("normalised", "maximum")
                for n in SHOWN
            ]
            body.append([f"{model}, {layer}", *cells])
    return study.table(head, body)


def tables(rows):
    found = compared(rows)
    sides = dict(better="higher", worse="lower", undecided="undecided")
    after = {name: sides[verdict.side] for name, verdict in found.items()}
    return {
        **{part: table(rows, part) for part in ("encoder", "decoder")},
        "verdict": study.sentences(found, sides=("higher", "lower")),
        "changed": study.changed(HERE, study.earlier(HERE), after),
    }


def compared(rows):
    """Returns the verdicts on the encoders: by depth, by model and by length."""
    names = {f"{m}, layer {layer}": (m, layer) for m in ATTENTIVE for layer in layers(rows)}

    def at(tokens):
        own = of(rows, part="encoder", tokens=tokens)
        return {n: entropies(of(own, model=m, layer=layer)) for n, (m, layer) in names.items()}

    scores, short = at(SHOWN[-1]), at(SHOWN[0])
    *_, before, last = layers(rows)
    pairs = [(f"{m}, layer {last}", f"{m}, layer {before}") for m in ATTENTIVE]
    pairs += [(f"MUSE, layer {last}", f"{m}, layer {last}") for m in ATTENTIVE[:2]]
    return study.compared(scores, f"entropy at {SHOWN[-1]} tokens", pairs) | {
        f"{name}, entropy at {SHOWN[-1]} tokens less that at {SHOWN[0]}": verdicts.verdict(
            scores[name], short[name]
        )
        for name in names
    }


def entropies(rows):
    """{seed: mean entropy of the heads, over its largest value}."""
    return {
        seed: statistics.mean(study.values(own, "normalised"))
        for (seed,), own in study.grouped(rows, "seed").items()
    }


def draw(rows):
    """Plots entropy, largest weight, and the attention of the last layer, of the encoders."""
    figure = study.figure(3, 3, height=3.4)
    panels = figure.subplots(3, 3)
    maps = study.read(HERE / "heatmaps.csv")
    for model, column in zip(ATTENTIVE, panels.T, strict=True):
        column[0].set(title=model, ylabel="entropy / its largest value", ylim=(0, 1))
        column[1].set(ylabel="largest weight", ylim=(0, 1), xlabel="tokens of the sentence")
        for color, layer in zip(study.COLORS, layers(rows), strict=False):
            own = of(rows, model=model, part="encoder", layer=layer)
            for axes, name in zip(column, ("normalised", "maximum"), strict=False):
                groups = study.grouped(own, "tokens")
                points = sorted(
                    (int(n), *study.point(by_seed(r, name))) for (n,), r in groups.items()
                )
                if points:
                    x, y, error = zip(*points, strict=True)
                    axes.errorbar(
                        x, y, error, color=color, label=f"layer {layer}", marker="o", ms=3
                    )
                for head in study.grouped(own, "head").values():
                    means = {
                        int(n): statistics.mean(study.values(r, name))
                        for (n,), r in study.grouped(head, "tokens").items()
                    }
                    axes.plot(sorted(means), [means[n] for n in sorted(means)], color=color, lw=0.4)
        for axes in column[:2]:
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, frameon=False)
        heat_map(column[2], of(maps, model=model))
    return figure


def heat_map(axes, rows):
    """Plots the mean attention of the heads of the last layer."""
    rows = of(rows, layer=max((row["layer"] for row in rows), default=""))
    if not rows:
        axes.set_axis_off()
        return
    axes.imshow([np.array(row["weights"].split(), float) for row in rows], cmap="Blues", vmin=0)
    pieces = [row["piece"].replace("\u2581", "_") for row in rows]
    axes.set(
        title=f"layer {rows[0]['layer']}, mean of its heads",
        xticks=range(len(rows)),
        yticks=range(len(rows)),
    )
    axes.title.set_fontsize(8)
    axes.set_xticklabels(pieces, fontsize=5, rotation=90, parse_math=False)
    axes.set_yticklabels(pieces, fontsize=5, parse_math=False)


if __name__ == "__main__":
    study.main(__file__, tables, draw)
