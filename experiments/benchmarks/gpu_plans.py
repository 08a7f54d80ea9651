# SPDX-License-Identifier: Apache-2.0
"""Compares implementations of a step on one H100 by the GPU compiler's account: gpu_plans.csv.

    python experiments/benchmarks/gpu_plans.py                # compiles what is not there yet
    python experiments/benchmarks/gpu_plans.py --only coatnet_0

Needs the extra [cuda], no GPU and no driver: `localglobal plan` with XLA's own compiler, one to
five minutes of a core a line. It continues where it was stopped; delete a line to make it again.
The numbers are of the compiled program, without autotuning; no GPU was measured.
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
TABLE = HERE / "gpu_plans.csv"
CONFIGS = HERE.parent.parent / "configs"
TOPOLOGY = "h100-1"
PACKAGES = ("jax", "flax")
MEASURES = (
    "roofline_ms",
    "estimated_ms",
    "bytes",
    "temporary",
    "kernels",
    "copied_bytes",
    "compile_cpu_seconds",
)
COLUMNS = ("row", "formulation", "config", "plan_step", "overrides", *MEASURES, *PACKAGES)
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
    """Returns the numbers of one line. Raises SystemExit with the compiler's error."""
    command = ["-m", "localglobal_jax", "plan", "--config", f"{CONFIGS}/{row.config}"]
    command += ["--topology", TOPOLOGY, "--step", row.step, "--json", "--timeout", "5400"]
    command += [f"--config.{key}={value}" for key, value in (row.overrides | overrides).items()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row.name}: {done.stderr.strip()[-2000:]}")
    report = json.loads(done.stdout)
    return numbers(report)


def numbers(report):
    """Returns the measures of a report of `localglobal plan --json`."""
    kinds = report["kernels"]
    return {
        "roofline_ms": round(sum(kind["roofline_ms"] for kind in kinds), 3),
        "estimated_ms": round(sum(kind["estimated_ms"] for kind in kinds), 3),
        "bytes": report["bytes_accessed"],
        "temporary": report["memory"]["temporary"],
        "kernels": sum(kind["count"] for kind in kinds),
        "copied_bytes": sum(kind["bytes"] for kind in kinds if kind["kind"] == "copy"),
        "compile_cpu_seconds": round(report["compile"]["cpu_seconds"]),
    }


def read():
    """Reads the lines, by row and formulation."""
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
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of the rows")
    parser.add_argument("--form", nargs="+", choices=FORMULATIONS, help="of the formulations")
    args = parser.parse_args()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    for row in ROWS:
        for form, overrides in FORMULATIONS.items():
            wanted = row.name in (args.only or [row.name]) and form in (args.form or [form])
            if not wanted or (row.name, form) in read():
                continue
            print(row.name, form, flush=True)
            about = {"row": row.name, "formulation": form, "config": row.config}
            about["plan_step"] = row.step
            about["overrides"] = " ".join(f"{k}={v}" for k, v in row.overrides.items())
            append(about | measure(row, overrides) | versions)


if __name__ == "__main__":
    main()
