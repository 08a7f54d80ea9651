# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and work of image models of a study, untrained: speed.csv and its table.

Training steps on one core, as a slot of a sweep has it, all models in turns in one process: a step
of one after a step of the other, so that other work on the machine affects all alike.
``times_as_fast`` is the median of the ratios to the first model's step beside it. Memory is the
compiler's account of the train step: its state, and its temporary memory. Multiply-adds are those
of one image, forward.
"""

import csv
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import jax

from experiments import study
from localglobal_jax.config import schema
from localglobal_jax.models import flops
from localglobal_jax.models.registry import create_model
from localglobal_jax.profiling import bench, compile, topologies


def measure(runs: Mapping[str, schema.Run], out: pathlib.Path, steps: int = 20) -> None:
    """Writes a row for each model. To be called before anything else uses jax.

    Args:
      runs: {model: run}; the first one is the baseline of ``times_as_fast``.
    """
    if hasattr(os, "sched_setaffinity"):  # before jax counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    steps = min([steps, *(run.steps - 1 for run in runs.values())])
    found = bench.measure(list(runs.values()), steps=steps)
    for (name, run), report in zip(runs.items(), found, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            facts = compile.compile_step(
                run, topologies.parse("cpu:1"), "train", pathlib.Path(folder)
            )
        ratio = report.get("times_as_fast_as_first", {"median": 1.0, "low": 1.0, "high": 1.0})
        rows.append(
            {
                "model": name,
                "parameters": facts["parameters"],
                "multiply_adds": multiply_adds(run),
                "step_ms": f"{report['step_ms']['median']:.1f}",
                "images_per_second": f"{report['items_per_second']:.1f}",
                "times_as_fast": f"{ratio['median']:.3f}",
                "low": f"{ratio['low']:.3f}",
                "high": f"{ratio['high']:.3f}",
                "state_bytes": facts["memory"]["arguments"],
                "temporary_bytes": facts["memory"]["temporary"],
                "compile_seconds": f"{report['compile_seconds']:.1f}",
                "load": f"{report['load']:.2f}",
            }
        )
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def multiply_adds(run: schema.Run) -> int:
    image = jax.ShapeDtypeStruct((1, *run.data.image_size, 1), "float32")
    return flops.model_cost(create_model(classes=10, **run.model), image).multiply_adds


def table(rows: Iterable[study.Row], models: Sequence[str], baseline: str) -> list[str]:
    """Returns the table of speed.csv, of the models that it has."""
    measured = {row["model"]: row for row in rows}
    head = ("model", "parameters", "multiply-adds", "images/s", f"times {baseline}'s", "state")
    body = [[name, *_cells(measured[name])] for name in models if name in measured]
    return study.table((*head, "work"), body or [["not run"] * (len(head) + 1)])


def _cells(row: study.Row) -> list[str]:
    return [
        f"{int(row['parameters']):,}",
        f"{int(row['multiply_adds']) / 1e6:.1f} M",
        f"{float(row['images_per_second']):.0f}",
        f"{float(row['times_as_fast']):.2f} ({row['low']} to {row['high']})",
        f"{int(row['state_bytes']) / 2**20:.1f} MiB",
        f"{int(row['temporary_bytes']) / 2**20:.1f} MiB",
    ]
