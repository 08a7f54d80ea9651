# SPDX-License-Identifier: Apache-2.0
"""Compares implementations of a training step by the TPU compiler's account: tpu.csv.

    python experiments/benchmarks/tpu.py                 # compiles what tpu.csv does not have yet
    python experiments/benchmarks/tpu.py --only coatnet_0_v5e

Needs the extra [tpu], no TPU: `localglobal plan` with the real compiler, five to twenty minutes of
a core a line. It continues where it was stopped; delete a line to make it again. Cycles and bytes
are the compiler's own account of one device and one step: no noise, and no hardware to validate it.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TABLE = HERE / "tpu.csv"
CONFIGS = HERE.parent.parent / "configs"
PACKAGES = ("jax", "libtpu", "flax")
MEASURES = ("cycles", "bytes", "temporary", "code", "needed", "fits", "compile_cpu_seconds")
COLUMNS = ("row", "formulation", "config", "topology", "batch_per_chip", *MEASURES, *PACKAGES)
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
    """Returns the numbers of one line, or the compiler's error."""
    if row.batch_per_chip:
        overrides = {"batch_size": str(row.batch_per_chip * row.chips), **overrides}
    command = ["-m", "localglobal_jax", "plan", "--config", f"{CONFIGS}/{row.config}"]
    command += ["--topology", row.topology, "--json", "--timeout", "5400"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row.name}: {done.stderr.strip()[-2000:]}")
    report = json.loads(done.stdout)
    return {
        "cycles": report.get("estimated_cycles"),  # none of a step that does not fit
        "bytes": report.get("bytes_accessed"),
        "temporary": report["memory"].get("temporary"),
        "code": report["memory"].get("code"),
        "needed": report["memory"].get("needed"),
        "fits": report["fits"],
        "compile_cpu_seconds": round(report["compile"]["cpu_seconds"]),
    }


def read():
    """Reads the lines, by row and implementation."""
    if not TABLE.is_file():
        return {}
    with TABLE.open(newline="") as file:
        return {(line["row"], line["formulation"]): line for line in csv.DictReader(file)}


def append(line):
    """Appends one line, on disk before the next begins."""
    new = not TABLE.is_file()
    with TABLE.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(line)


def main():
    """Makes every missing line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of the rows, e.g. in parallel")
    parser.add_argument("--form", nargs="+", help="of the formulations, likewise")
    args = parser.parse_args()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    for row in ROWS:
        for form, overrides in row.forms.items():
            wanted = row.name in (args.only or [row.name]) and form in (args.form or [form])
            if not wanted or (row.name, form) in read():
                continue
            print(row.name, form, flush=True)
            about = {"row": row.name, "formulation": form, "config": row.config}
            about |= {"topology": row.topology, "batch_per_chip": row.batch_per_chip}
            append(about | measure(row, overrides) | versions)


if __name__ == "__main__":
    main()
