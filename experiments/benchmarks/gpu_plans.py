# SPDX-License-Identifier: Apache-2.0
"""Compares implementations of a step on one H100 by the GPU compiler's account: gpu_plans.csv.

    python experiments/benchmarks/gpu_plans.py                # compiles what is not there yet
    python experiments/benchmarks/gpu_plans.py --only coatnet_0

Needs the extra [cuda], no GPU and no driver: `localglobal plan` with XLA's own compiler, one to
five minutes of a core a line. It continues where it was stopped; delete a line to make it again.
The numbers are of the compiled program, without autotuning; no GPU was measured.
"""

import dataclasses
import pathlib

import plans

TABLE = pathlib.Path(__file__).parent / "gpu_plans.csv"
TOPOLOGY = "h100-1"
PACKAGES = ("jax", "flax")
FORMULATIONS = {"plain": {"parallel.implementation": "reference"}, "tuned": {}}
IMAGES = {"batch_size": "64"}
# The smallest batch of the recipe: 8 micro-batches of 32 pairs of 256 tokens.
TOKENS = {"batch_size": "65536"}
# Four pairs of 64 tokens, 5 beams each.
SENTENCES = {"batch_size": "256", "data.max_length": "64", "data.rows_multiple": "4"}
SENTENCES |= {"optim.accumulate": "1"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of a config."""

    name: str
    config: str
    overrides: dict[str, str]
    step: str = "train"
    forms: dict[str, dict[str, str]] = dataclasses.field(default_factory=lambda: FORMULATIONS)


ROWS = (
    Row("coatnet_0", "coatnet_imagenet.py:variant=0", IMAGES),
    Row("CATT", "coatnet_imagenet.py:variant=0", IMAGES | {"model.layout": "CATT"}),
    Row("CETT", "coatnet_imagenet.py:variant=0", IMAGES | {"model.layout": "CETT"}),
    Row("volo_d1", "volo_imagenet.py:variant=d1", IMAGES),
    Row("focal_tiny", "focal_imagenet.py:variant=tiny", IMAGES),
    Row("muse_wmt_en_de", "muse_wmt14.py:pair=en-de", TOKENS),
    Row("coatnet_2", "coatnet_imagenet.py:variant=2", IMAGES),
    Row("muse_wmt_en_de decoding", "muse_wmt14.py:pair=en-de", SENTENCES, step="decode"),
)


def measure(row, overrides):
    """Returns the columns of one line."""
    report = plans.plan(row.config, TOPOLOGY, row.overrides | overrides, row.step)
    kinds = report["kernels"]
    return {
        "config": row.config,
        "plan_step": row.step,
        "overrides": " ".join(f"{k}={v}" for k, v in row.overrides.items()),
        "roofline_ms": round(sum(kind["roofline_ms"] for kind in kinds), 3),
        "estimated_ms": round(sum(kind["estimated_ms"] for kind in kinds), 3),
        "bytes": report["bytes_accessed"],
        "temporary": report["memory"]["temporary"],
        "kernels": sum(kind["count"] for kind in kinds),
        "copied_bytes": sum(kind["bytes"] for kind in kinds if kind["kind"] == "copy"),
        "compile_cpu_seconds": round(report["compile"]["cpu_seconds"]),
    }


if __name__ == "__main__":
    plans.make(TABLE, ROWS, measure, PACKAGES, __doc__.splitlines()[0])
