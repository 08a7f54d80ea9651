# SPDX-License-Identifier: Apache-2.0
"""Draws results.csv and erf.csv of `measure.py` -> table.md, figure.png and the README's table.

python -m experiments.operator_properties.make
"""

import math
import pathlib

import numpy as np

from experiments import study

HERE = pathlib.Path(__file__).parent
LENGTHS = ("64", "256", "1024")
HEAD = (
    "operator",
    "reach: declared",
    "measured",
    "spread",
    "weights change",
    "shift error, circular",
    "inside",
    "multiply-adds a position, 64 / 256 / 1,024",
    "compiled",
    "time / depthwise",
)


def measured(rows, space):
    """{operator: {measure: value}} of one space."""
    groups = study.grouped((row for row in rows if row["space"] == space), "operator")
    return {
        key[0]: {row["measure"]: row["value"] for row in those} for key, those in groups.items()
    }


def small(text):
    value = float(text)
    return "0" if value < 1e-6 else f"{value:.1g}" if value < 0.1 else f"{value:.2f}"


def line(name, found):
    costs = [
        " / ".join(f"{float(found[f'{key} {n}']):,.0f}" for n in LENGTHS)
        for key in ("multiply-adds", "compiled")
    ]
    times = " / ".join(f"{float(found[f'time {n}']):.1f}" for n in LENGTHS)
    kept = [small(found[key]) for key in ("dynamic", "circular", "interior")]
    spread = f"{float(found['spread']):.1f}"
    return [name, found["declared"] or "none", found["farthest"], spread, *kept, *costs, times]


def tables(rows):
    return {
        space: study.table(HEAD, [line(*item) for item in measured(rows, space).items()])
        for space in ("grid", "sequence")
    }


def draw(rows):
    """Plots the fields of the grids as images, of the sequences as lines; below, the costs."""
    fields = study.read(HERE / "erf.csv")
    grids = [row for row in fields if row["space"] == "grid"]
    columns = max(1, math.ceil(len(grids) / 2))
    figure = study.figure(columns, 5, width=1.9, height=2.1)
    pictures, below = figure.subfigures(2, 1, height_ratios=(2, 3))
    for axes in (all_axes := pictures.subplots(2, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, row in zip(all_axes.flat, grids, strict=False):
        values = np.array(row["values"].split(), float)
        axes.imshow(
            values.reshape(math.isqrt(len(values)), -1) ** 0.5, cmap="Blues", vmin=0, vmax=1
        )
        axes.set_title(row["operator"], fontsize=8)
    pictures.suptitle(
        "what a position in the middle of a 16 x 16 grid sees (square root)", fontsize=9
    )
    (field, sums), (times, flat) = below.subplots(2, 2)
    for row in (row for row in fields if row["space"] == "sequence"):
        values = np.array(row["values"].split(), float)
        field.plot(np.arange(len(values)) - len(values) // 2, values, label=row["operator"])
    field.set(title="the same, a sequence of 64", yscale="log", ylim=(1e-3, 1.5), xlabel="distance")
    for axes, space, key, title in (
        (sums, "sequence", "compiled", "multiply-adds of a position, as compiled, sequence"),
        (times, "sequence", "time", "time over depthwise convolution's, sequence"),
        (flat, "grid", "time", "time over depthwise convolution's, grid"),
    ):
        for name, found in measured(rows, space).items():
            values = [float(found[f"{key} {n}"]) for n in LENGTHS]
            axes.plot(LENGTHS, values, marker="o", ms=3, label=name)
        axes.set(title=title, yscale="log", xlabel="positions")
    for axes in (field, sums, times, flat):
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (field, flat):
        if axes.lines:
            axes.legend(fontsize=6, frameon=False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
