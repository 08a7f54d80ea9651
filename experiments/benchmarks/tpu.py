# SPDX-License-Identifier: Apache-2.0
"""Compares implementations of a training step by the TPU compiler's account: tpu.csv.

    python experiments/benchmarks/tpu.py                 # compiles what tpu.csv does not have yet
    python experiments/benchmarks/tpu.py --only coatnet_0_v5e

Needs the extra [tpu], no TPU: `localglobal plan` with the real compiler, five to twenty minutes of
a core a line. It continues where it was stopped; delete a line to make it again. Cycles and bytes
are the compiler's own account of one device and one step: no noise, and no hardware to validate it.
"""

import dataclasses
import pathlib

import plans

TABLE = pathlib.Path(__file__).parent / "tpu.csv"
PACKAGES = ("jax", "libtpu", "flax")
PLAIN = {"plain": {"parallel.implementation": "reference"}}
TUNED = {"tuned": {}}
FORMULATIONS = PLAIN | TUNED
RECOMPUTED = {"parallel.remat": "blocks"}
LOOPS = {"unrolled": RECOMPUTED, "scan": {"parallel.scan": "True", **RECOMPUTED}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One step in several forms; ratios are to the first. A batch of None is the config's own."""

    name: str
    config: str
    topology: str
    chips: int
    batch_per_chip: int | None = None
    forms: dict[str, dict[str, str]] = dataclasses.field(default_factory=lambda: FORMULATIONS)


def coatnet(variant, topology, chips, batch, forms=FORMULATIONS):
    """Images of 224x224, bfloat16."""
    name = f"coatnet_{variant}_{topology.split(':')[0]}" + ("" if batch == 64 else f"_b{batch}")
    return Row(name, f"coatnet_imagenet.py:variant={variant}", topology, chips, batch, forms)


ROWS = (  # in the order in which they are worth having
    coatnet(0, "v5e:4x4", 16, 64),
    Row("muse_wmt_en_de_v5e", "muse_wmt14.py:pair=en-de", "v5e:4x4", 16),
    coatnet(0, "v5p:2x2x4", 16, 64),
    coatnet(4, "v5e:16x16", 256, 16, LOOPS),
    # the largest batches: what fits, and what does not
    coatnet(0, "v5e:4x4", 16, 128, PLAIN),
    coatnet(0, "v5e:4x4", 16, 144, PLAIN),
    coatnet(0, "v5e:4x4", 16, 208, TUNED),
    coatnet(0, "v5e:4x4", 16, 288, {"tuned, recomputed": RECOMPUTED}),
    coatnet(0, "v5e:4x4", 16, 176, PLAIN),
    coatnet(0, "v5e:4x4", 16, 192, PLAIN),
    coatnet(0, "v5e:4x4", 16, 256, PLAIN),
    coatnet(0, "v5e:4x4", 16, 448, {"tuned, recomputed": RECOMPUTED}),
    coatnet(0, "v5e:4x4", 16, 384, {"tuned, recomputed": RECOMPUTED}),
    coatnet(0, "v5e:4x4", 16, 224, PLAIN),
    coatnet(2, "v5e:4x4", 16, 64),
    coatnet(2, "v5p:2x2x4", 16, 64),
)


def measure(row, overrides):
    """Returns the columns of one line."""
    if row.batch_per_chip:
        overrides = {"batch_size": str(row.batch_per_chip * row.chips), **overrides}
    report = plans.plan(row.config, row.topology, overrides)
    return {
        "config": row.config,
        "topology": row.topology,
        "batch_per_chip": row.batch_per_chip,
        "cycles": report.get("estimated_cycles"),  # none of a step that does not fit
        "bytes": report.get("bytes_accessed"),
        "temporary": report["memory"].get("temporary"),
        "code": report["memory"].get("code"),
        "needed": report["memory"].get("needed"),
        "fits": report["fits"],
        "compile_cpu_seconds": round(report["compile"]["cpu_seconds"]),
    }


if __name__ == "__main__":
    plans.make(TABLE, ROWS, measure, PACKAGES, __doc__.splitlines()[0])
