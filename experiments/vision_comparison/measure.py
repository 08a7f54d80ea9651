# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and work of this study's models, untrained -> speed.csv.

    python -m experiments.vision_comparison.measure [laptop]

Training steps on one core, as a slot of a sweep has it, all models in turns in one process: a step
of one after a step of the other, so that other work on the machine affects all alike.
``times_as_fast`` is the median of the ratios to the CoAtNet step beside it. Memory is the
compiler's account of the train step: its state, and its temporary memory. Multiply-adds are
those of one image, forward.
"""

import csv
import os
import pathlib
import sys
import tempfile

if hasattr(os, "sched_setaffinity"):  # before jax counts the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax

from localglobal_jax.config import loading
from localglobal_jax.launch import expand
from localglobal_jax.models import flops
from localglobal_jax.models.registry import create_model
from localglobal_jax.profiling import bench, compile, topologies

HERE = pathlib.Path(__file__).parent
FIRST = "CoAtNet"


def main(size: str = "laptop", steps: int = 20, out: pathlib.Path = HERE / "speed.csv") -> None:
    """Writes a row for each model, CoAtNet first."""
    spec = f"{HERE / 'sweep.py'}:size={size}"
    module, _ = loading.load_module(spec)
    described = expand.expand(spec, "unused").runs
    names = list(module.models(size))
    runs = {name: run.run for name, run in zip(names, described[-len(names) :], strict=True)}
    runs = {FIRST: runs.pop(FIRST), **runs}
    rows = []
    found = bench.measure(list(runs.values()), steps=min(steps, described[0].run.steps - 1))
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


def multiply_adds(run) -> int:
    image = jax.ShapeDtypeStruct((1, *run.data.image_size, 1), "float32")
    return flops.model_cost(create_model(classes=10, **run.model), image).multiply_adds


if __name__ == "__main__":
    main(*sys.argv[1:])
