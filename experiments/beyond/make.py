# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png, kernels.png and the README's tables.

    python -m experiments.beyond.make

results.csv and shifts.csv are of one setting; grid.csv, warmup.csv, final.csv and final_shifts.csv
are of the protocol; kernels.csv, pictures.csv and picture_kernels.csv are of `measure_kernels.py`.
"""

import pathlib

import numpy as np

from experiments import protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
LAYOUTS = ("CCTT", "CCAA", "CCEE", "CMMT")
BASELINE = "CCTT"
PAIRS = [(layout, BASELINE) for layout in LAYOUTS if layout != BASELINE]
COMPARED = ("3", "4")  # pixels of a shift that has verdicts
NAMES = (  # of the classes: arXiv 1708.07747, table 2
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def percent(found):
    return {seed: 100 * value for seed, value in found.items()}


def accuracies(rows, layouts=LAYOUTS):
    """{layout: {seed: per cent}} of the images as they are."""
    own = {n: [row for row in rows if row["model.layout"] == n] for n in layouts}
    return {n: percent(study.by_seed(found, "test/accuracy")) for n, found in own.items()}


def shifts(rows, column, layouts=LAYOUTS):
    """{shift: {layout: {seed: per cent}}} of the rows of `measure.py`."""
    steps = sorted({row["shift"] for row in rows}, key=int)
    return {
        step: {
            n: percent(study.by_seed(study.where(rows, layout=n, shift=step), column))
            for n in layouts
        }
        for step in steps
    }


def reported_shifts(folder=HERE):
    """Returns the shifts of the reported runs."""
    tuned = protocol.state(folder) == protocol.TUNED
    return study.read(folder / ("final_shifts.csv" if tuned else "shifts.csv"))


def compared(rows, moved, layouts=LAYOUTS, pairs=PAIRS):
    """Returns the verdicts on the pairs of layouts, unmoved and moved."""
    found = study.compared(accuracies(rows, layouts), "test accuracy, points", pairs)
    for step, scores in shifts(moved, "accuracy", layouts).items():
        if step in COMPARED:
            found |= study.compared(scores, f"accuracy after {step} pixels, points", pairs)
    return found


def results(rows, layouts=LAYOUTS):
    """Returns the table of accuracy, difference from CCTT and setting, and the ranking."""
    found = accuracies(rows, layouts)
    body = []
    for n, own in found.items():
        apart = "" if n == BASELINE else study.shown(verdicts.paired(own, found[BASELINE]))
        setting = study.setting([r for r in rows if r["model.layout"] == n], protocol.IMAGES)
        body.append((n, study.shown(list(own.values())), apart, *setting))
    head = ("layout", "test accuracy", "minus CCTT", "learning rate", "warm-up")
    return [*study.table(head, body), "", f"Best first: {study.ranked(found)}"]


def robustness(moved, column, layouts=LAYOUTS):
    """Returns the table of a column of the shifts, and the ranking of each shift."""
    found = shifts(moved, column, layouts)
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in layouts]
    if not found:
        return study.table(["layout", "moved"], [[n, "not run"] for n in layouts]), []
    heads = [f"{step} px" for step in found]
    ranking = [
        f"- {head}: {study.ranked(each)}" for head, each in zip(heads, found.values(), strict=True)
    ]
    return study.table(["layout", *heads], body), ranking


def tables(rows):
    reported, moved = protocol.reported(HERE), reported_shifts()
    accuracy, best = robustness(moved, "accuracy")
    agreement, _ = robustness(moved, "agreement")
    before = compared(rows, study.read(HERE / "shifts.csv"))
    after = compared(reported, moved)
    sides = [{name: each.side for name, each in found.items()} for found in (before, after)]
    one = [(n, study.shown(list(own.values()))) for n, own in accuracies(rows).items()]
    return {
        "vision": results(reported),
        "shifts": [*accuracy, *(["", *best[1:]] if best else [])],
        "agreement": agreement,
        "verdict": study.sentences(after),
        "kernels": kernels(),
        "grid": study.grid(HERE, SWEEP.models_of(None), protocol.IMAGES, scale=100, digits=2),
        "one setting": study.table(("layout", "test accuracy"), one),
        "changed": study.changed(HERE, *sides),
    }


def kernels():
    """Returns the table of how the kernels of each block depend on the image."""
    found = study.grouped(study.read(HERE / "kernels.csv"), "block")
    columns = (("centre", 3), ("effective", 2), ("moved", 3))
    body = [
        (
            block,
            str(len(own)),
            *(study.shown(study.values(own, c), digits) for c, digits in columns),
        )
        for (block,), own in found.items()
    ]
    head = ("block", "runs", "weight of the position itself", "effective positions")
    return study.table((*head, "distance from the mean kernel"), body)


def mosaic(rows):
    """Returns the kernels [h, w, k, k] of a picture as one image, with a gap between positions."""
    side = 1 + max(int(row["row"]) for row in rows)
    window = round(len(rows[0]["kernel"].split()) ** 0.5)
    image = np.full((side * (window + 1) - 1,) * 2, np.nan)
    for row in rows:
        y, x = (int(row[name]) * (window + 1) for name in ("row", "column"))
        weights = np.asarray(row["kernel"].split(), float)
        image[y : y + window, x : x + window] = weights.reshape(window, window)
    return image


def draw_kernels():
    """Plots pictures, and for each block the kernel of every position."""
    pictures = study.read(HERE / "pictures.csv")
    found = study.grouped(study.read(HERE / "picture_kernels.csv"), "image", "block")
    blocks = list(dict.fromkeys(block for _, block in found))
    figure = study.figure(1 + len(blocks), len(pictures), width=1.7, height=1.7)
    grid = figure.subplots(len(pictures), 1 + len(blocks), squeeze=False)
    for place, name in zip(grid[0], ("image", *blocks), strict=True):
        place.set_title(name, fontsize=9)
    for axes, picture in zip(grid, pictures, strict=True):
        side = int(picture["height"])
        pixels = np.frombuffer(bytes.fromhex(picture["pixels"]), np.uint8).reshape(side, side)
        axes[0].imshow(pixels, cmap="gray")
        axes[0].set_ylabel(NAMES[int(picture["label"])], fontsize=9)
        for place, block in zip(axes[1:], blocks, strict=True):
            image = mosaic(found[picture["image"], block])
            shown = place.imshow(image, cmap="Blues", vmin=0, vmax=0.6)
        for place in axes:
            place.set(xticks=(), yticks=())
            place.spines[:].set_visible(False)
    figure.colorbar(shown, ax=grid, shrink=0.3, label="weight")
    return figure


def draw_shifts(moved, layouts=LAYOUTS):
    """Plots accuracy and agreement against the shift."""
    figure = study.figure(2)
    left, right = figure.subplots(1, 2)
    study.curves(left, layouts, shifts(moved, "accuracy", layouts))
    study.curves(right, layouts, shifts(moved, "agreement", layouts))
    left.set_title("test accuracy, %", fontsize=10)
    right.set_title("same answer as without the shift, %", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("pixels that the test images are moved by")
    return figure


def draw(_):
    return draw_shifts(reported_shifts())


if __name__ == "__main__":
    study.main(__file__, tables, draw)
    study.save(draw_kernels(), HERE / "kernels.png")
