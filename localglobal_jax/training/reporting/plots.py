# SPDX-License-Identifier: Apache-2.0
"""The learning curve of a run, as a PNG."""

import collections
import os
import pathlib

from localglobal_jax.checkpoints.workdir import shown
from localglobal_jax.training.reporting.metrics_log import read_metrics

PANELS = ("loss", "accuracy", "bleu")  # panels, where the metric exists


def learning_curve(workdir: str | os.PathLike) -> pathlib.Path:
    """Draws ``metrics.jsonl`` over the steps as ``learning_curve.png``; returns its path.

    One panel per metric of `PANELS`, one curve per split. Raises ValueError if there is no metric.
    """
    # Objects, not pyplot: no global state, no display, no choice of back end. Imported here because
    # the import takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = read_metrics(workdir)
    panels = [name for name in PANELS if any(name in line for line in lines)]
    if not panels:
        raise ValueError(
            f"no learning curve: {shown(workdir)}/metrics.jsonl has none of the metrics {PANELS}"
        )
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
