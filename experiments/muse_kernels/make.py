# SPDX-License-Identifier: Apache-2.0
"""results.csv and gates.csv -> table.md, figure.png and the README's tables.

python -m experiments.muse_kernels.make
"""

import ast
import pathlib

from experiments import study
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
FIELDS = ("windows", "kind", "projection", "ffn")
OWN = ("dynamic", "shared", "own")
VARIANTS = (  # name, (windows, kind, projection, ffn), the paper's BLEU (None: not there)
    ("adaptive (3, 15)", ("(3, 15)", *OWN), 36.3),
    ("no convolution", ("()", *OWN), 35.8),
    ("3", ("(3,)", *OWN), 36.2),
    ("7", ("(7,)", *OWN), 36.2),
    ("15", ("(15,)", *OWN), 36.0),
    ("31", ("(31,)", *OWN), 35.8),
    ("growing", ("growing", *OWN), 35.9),
    ("3, own projection", ("(3,)", "dynamic", "separate", "own"), 34.9),
    ("3, static kernel", ("(3,)", "depthwise", "shared", "own"), None),
    ("3, standard, own projection", ("(3,)", "standard", "separate", "own"), 35.2),
    ("adaptive, no pointwise net", ("(3, 15)", "dynamic", "shared", "off"), 33.5),
    ("7, pointwise net shares its input", ("(7,)", "dynamic", "shared", "shared"), 35.1),
)


def variant(row):
    values = {field: row[f"model.blocks.M.{field}"] for field in FIELDS}
    windows = ast.literal_eval(values["windows"])
    if windows and isinstance(windows[0], tuple):  # one per layer
        values["windows"] = "growing"
    return tuple(values.values())


def runs(rows):
    """{name: {seed: row}} of the runs that are done."""
    return {
        name: {row["seed"]: row for row in rows if variant(row) == wanted}
        for name, wanted, _ in VARIANTS
    }


def numbers(own, column):
    return {seed: float(row[column]) for seed, row in own.items()}


def tables(rows):
    found = runs(rows)
    reference = numbers(found[VARIANTS[0][0]], "test/nll")
    body = []
    for name, _, paper in VARIANTS:
        loss, bleu = (numbers(found[name], f"test/{metric}") for metric in ("nll", "bleu"))
        more = verdicts.paired(loss, reference)
        body.append(
            (
                name,
                "" if paper is None else f"{paper}",
                study.shown(list(bleu.values())),
                study.shown(list(loss.values()), 3),
                "" if name == VARIANTS[0][0] else study.shown(more, 3),
            )
        )
    head = (
        "convolution beside attention",
        "the paper's BLEU",
        "BLEU",
        "loss",
        "more than adaptive",
    )
    losses = {name: numbers(own, "test/nll") for name, own in found.items()}
    first, *others = losses
    lines = study.verdict_lines(
        losses, "loss", [(n, first) for n in others], digits=3, smaller_is_better=True
    )
    tables = {"kernels": study.table(head, body), "gates": study.table(*gates())}
    return {**tables, "verdict": lines}


def gates():
    """Returns head and body of the table of gates: the share of the smaller kernel by layer."""
    rows = [row for row in study.read(HERE / "gates.csv") if row["ffn"] == "own"]
    layers = sorted({row["layer"] for row in rows}, key=int) or ["1", "2", "3"]
    body = []
    for (steps, part), own in study.grouped(rows, "steps", "part").items():
        shares = [study.values([r for r in own if r["layer"] == n], "share") for n in layers]
        body.append([f"{part}, {int(steps):,} steps", *(study.shown(s, 3) for s in shares)])
    return ["", *(f"layer {n}" for n in layers)], body or [["not run"] + [""] * len(layers)]


def draw(rows):
    """Plots the loss of every variant minus that of the adaptive one, and the gates by depth."""
    figure = study.figure(2, 1, width=5.0, height=3.6)
    losses, shares = figure.subplots(1, 2)
    found = runs(rows)
    reference = numbers(found[VARIANTS[0][0]], "test/nll")
    names = [name for name, *_ in VARIANTS[1:]]
    for place, name in enumerate(names):
        more = verdicts.paired(numbers(found[name], "test/nll"), reference)
        if more:
            mean, half = study.point(more)
            losses.errorbar(mean, place, xerr=half, marker="o", color=study.COLORS[0], capsize=2)
    losses.axvline(0, color="0.6", lw=0.8)
    losses.set(yticks=range(len(names)), xlabel="loss more than adaptive (3, 15), nats")
    losses.set_yticklabels(names, fontsize=7)
    losses.invert_yaxis()
    rows = [row for row in study.read(HERE / "gates.csv") if row["ffn"] == "own"]
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
