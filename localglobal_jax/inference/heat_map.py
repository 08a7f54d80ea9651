# SPDX-License-Identifier: Apache-2.0
"""Heat maps of matrices whose rows and columns are pieces of text."""

import functools
import logging
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

log = logging.getLogger(__name__)

KINDS = (".png", ".pdf", ".svg")
CELL, LARGEST = 0.28, 48.0  # inches: of a cell, and of a side of all cells
LETTERS = 6.5, 10.0  # points: the smallest and the largest


def check(path: str) -> None:
    """Raises ValueError for a file that cannot be written; call it before the computation."""
    file = pathlib.Path(path)
    if file.suffix not in KINDS:
        raise ValueError(f"{path}: give a file name that ends in {', '.join(KINDS)}")
    if not file.parent.is_dir():
        raise ValueError(f"{path}: the directory {file.parent} does not exist; create it first")


def draw(
    path: str | BinaryIO,
    weights: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_name: str,
    column_name: str,
) -> None:
    """Draws `weights` [rows, columns], all at least 0; darker is larger.

    A file that is already open gets a PNG.
    """
    # Objects, not pyplot: no global state, no display. Imported here, as it takes a second.
    from matplotlib import rcParams  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    cell = min(CELL, LARGEST / max(weights.shape))
    size = min(LETTERS[1], max(LETTERS[0], 0.55 * cell * 72))
    every = math.ceil(
        1.2 * size / 72 / cell
    )  # with more pieces than can be labelled, every n-th is
    height, width = (cell * n for n in weights.shape)
    # the axes fill the figure, and the figure is cropped around the labels
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(weights, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    named = (range(0, n, every) for n in weights.shape)
    for axis, places, pieces in zip((axes.yaxis, axes.xaxis), named, (rows, columns), strict=True):
        # SentencePiece's sign for a blank would be drawn as a thick bar
        axis.set_ticks(places, [pieces[i].replace("\u2581", "_") for i in places])
        if every == 1:
            axis.set_ticks(np.arange(1, len(pieces)) - 0.5, minor=True)
        for label in axis.get_ticklabels():
            label.set(
                fontsize=size, parse_math=False
            )  # a dollar sign is text, not the start of a formula
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    axes.tick_params(which="minor", length=0)
    for label in axes.get_xticklabels():
        label.set(rotation=60, ha="left", va="baseline", rotation_mode="anchor")
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.spines[:].set_color("0.7")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(column_name, labelpad=8)
    axes.set_ylabel(row_name, labelpad=8)
    axes.set_title(title, fontsize=11, pad=10)
    bar = figure.add_axes((1 + 0.2 / width, 0, 0.12 / width, min(1, 2.5 / height)))
    figure.colorbar(image, cax=bar).outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.2)
    if any(str(warning.message).startswith("Glyph") for warning in caught):
        _warn_of_boxes(", ".join(rcParams["font.family"]))


@functools.cache
def _warn_of_boxes(font: str) -> None:
    """Logs, once in a process, that characters are missing: training draws many heat maps."""
    log.warning(
        "heat map: matplotlib's font %s lacks some characters, which are drawn as boxes. Name an "
        "installed font that has them as font.family in a matplotlibrc",
        font,
    )
