# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.muse_kernels.make

results.csv and gates.csv are of one setting; grid.csv, warmup.csv, final.csv and final_gates.csv
are of the protocol.
"""

import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
MODELS = SWEEP.models_of(None)
FIRST, *OTHERS = MODELS
PAPER = {  # BLEU, arXiv 1911.09483, tables 6 and 7
    "adaptive (3, 15)": 36.3,
    "no convolution": 35.8,
    "3": 36.2,
    "7": 36.2,
    "15": 36.0,
    "31": 35.8,
    "growing": 35.9,
    "3, own projection": 34.9,
    "3, standard, own projection": 35.2,
    "adaptive, no pointwise net": 33.5,
    "7, pointwise net shares its input": 35.1,
}


def runs(rows):
    """{variant: rows} of the runs that are done."""
    found = {name: [] for name in MODELS}
    for row in rows:
        found[protocol.model_of(row, MODELS)].append(row)
    return found


def scores(rows, metric):
    """{variant: {seed: number}} of a metric of the test set."""
    return {name: study.by_seed(own, f"test/{metric}") for name, own in runs(rows).items()}


def compared(rows):
    """Returns the verdicts on every variant against the first, by loss."""
    pairs = [(name, FIRST) for name in OTHERS]
    return study.compared(scores(rows, "nll"), "loss", pairs, smaller_is_better=True)


def tables(rows):
    reported = protocol.reported(HERE)
    losses, bleus = scores(reported, "nll"), scores(reported, "bleu")
    body = []
    for name in MODELS:
        more = verdicts.paired(losses[name], losses[FIRST])
        body.append(
            (
                name,
                str(PAPER.get(name, "")),
                study.shown(list(bleus[name].values())),
                study.shown(list(losses[name].values()), 3),
                "" if name == FIRST else study.shown(more, 3),
            )
        )
    head = (
        "convolution beside attention",
        "the paper's BLEU",
        "BLEU",
        "loss",
        "more than adaptive",
    )
    settings = [(n, *study.setting(own, protocol.TEXT)) for n, own in runs(reported).items()]
    before, after = compared(rows), compared(reported)
    sides = [{name: each.side for name, each in found.items()} for found in (before, after)]
    one = [(n, study.shown(list(own.values()), 3)) for n, own in scores(rows, "nll").items()]
    return {
        "kernels": study.table(head, body),
        "gates": study.table(*gates()),
        "verdict": study.sentences(after, 3),
        "setting": study.table(("variant", "norm", "learning rate", "warm-up"), settings),
        "grid": study.grid(HERE, MODELS, protocol.TEXT),
        "one setting": study.table(("variant", "loss"), one),
        "changed": study.changed(HERE, *sides),
    }


def own_gates():
    """Returns the rows of `measure.py` of the reported runs, but those without pointwise nets."""
    tuned = protocol.state(HERE) == protocol.TUNED
    return study.where(study.read(HERE / f"{'final_' if tuned else ''}gates.csv"), ffn="own")


def gates():
    """Returns head and body of the table of gates: the share of the smaller kernel by layer."""
    rows = own_gates()
    layers = sorted({row["layer"] for row in rows}, key=int) or ["1", "2", "3"]
    body = []
    for (steps, part), own in study.grouped(rows, "steps", "part").items():
        shares = [study.values([r for r in own if r["layer"] == n], "share") for n in layers]
        body.append([f"{part}, {int(steps):,} steps", *(study.shown(s, 3) for s in shares)])
    return ["", *(f"layer {n}" for n in layers)], body or [["not run"] + [""] * len(layers)]


def draw(_):
    """Plots the loss of every variant minus that of the adaptive one, and the gates by depth."""
    figure = study.figure(2, 1, width=5.0, height=3.6)
    losses, shares = figure.subplots(1, 2)
    found = scores(protocol.reported(HERE), "nll")
    for place, name in enumerate(OTHERS):
        more = verdicts.paired(found[name], found[FIRST])
        if more:
            mean, half = study.point(more)
            losses.errorbar(mean, place, xerr=half, marker="o", color=study.COLORS[0], capsize=2)
    losses.axvline(0, color="0.6", lw=0.8)
    losses.set(yticks=range(len(OTHERS)), xlabel="loss more than adaptive (3, 15), nats")
    losses.set_yticklabels(OTHERS, fontsize=7)
    losses.invert_yaxis()
    rows = own_gates()
    for color, ((steps, part), own) in zip(
        study.COLORS, study.grouped(rows, "steps", "part").items(), strict=False
    ):
        points = [
            (int(layer), *study.point(study.values(those, "share")))
            for (layer,), those in study.grouped(own, "layer").items()
        ]
        x, y, error = zip(*sorted(points), strict=True)
        label = f"{part}, {int(steps):,} steps"
        shares.errorbar(x, y, error, color=color, marker="o", capsize=2, label=label)
    shares.axhline(0.5, color="0.6", lw=0.8)
    shares.set(xlabel="layer", ylabel="share of the small kernel (3 against 15)")
    shares.xaxis.get_major_locator().set_params(integer=True)
    if rows:
        shares.legend(fontsize=7, frameon=False)
    for axes in (losses, shares):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
