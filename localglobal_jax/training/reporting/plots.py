# SPDX-License-Identifier: Apache-2.0
"""The learning curve of a run, as a PNG."""

import collections
import os
import pathlib

from localglobal_jax.training.reporting.metrics_log import read_metrics

PANELS = ("loss", "accuracy", "bleu")  # of the learning curve; those that occur are drawn


def learning_curve(workdir: str | os.PathLike) -> pathlib.Path:
    """Draws ``metrics.jsonl`` over the steps as ``learning_curve.png``; returns its path.

    One panel for each of `PANELS`, one curve for each split; ValueError if nothing can be drawn.
    """
    # Objects, not pyplot: no global state, no display, no back end chosen for others. Imported
    # here because it takes a second that most commands can do without.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = read_metrics(workdir)
    panels = [name for name in PANELS if any(name in line for line in lines)]
    if not panels:
        raise ValueError(f"no learning curve: none of {PANELS} in {workdir}/metrics.jsonl")
    figure = Figure(figsize=(5.5 * len(panels), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves = collections.defaultdict(list)
        for line in lines:
            if name in line:
                curves[line["split"]].append((line["step"], float(line[name])))
        for split, points in curves.items():
            marker = "." if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), label=split, marker=marker)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    path = pathlib.Path(workdir) / "learning_curve.png"
    FigureCanvasAgg(figure).print_png(str(path))
    return path
