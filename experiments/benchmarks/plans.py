# SPDX-License-Identifier: Apache-2.0
"""Makes a table of `localglobal plan` line by line, each on disk before the next is compiled."""

import argparse
import csv
import importlib.metadata
import json
import pathlib
import subprocess
import sys

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def plan(config, topology, overrides, step="train"):
    """Returns the report of one step. Raises SystemExit with the compiler's error."""
    command = ["-m", "localglobal_jax", "plan", "--config", f"{CONFIGS}/{config}"]
    command += ["--topology", topology, "--step", step, "--json", "--timeout", "5400"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{config}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def make(table, rows, line, packages, description):
    """Appends every missing line to a CSV file.

    `rows` have a ``name`` and ``forms``, formulation -> overrides; `line(row, overrides)` returns
    the other columns. The versions of `packages` are the last.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of the rows, e.g. in parallel")
    parser.add_argument("--form", nargs="+", help="of the formulations, likewise")
    args = parser.parse_args()
    versions = {package: importlib.metadata.version(package) for package in packages}
    for row in rows:
        for form, overrides in row.forms.items():
            wanted = row.name in (args.only or [row.name]) and form in (args.form or [form])
            if wanted and (row.name, form) not in _made(table):
                print(row.name, form, flush=True)
                about = {"row": row.name, "formulation": form}
                _append(table, about | line(row, overrides) | versions)


def _made(table):
    if not table.is_file():
        return set()
    with table.open(newline="") as file:
        return {(line["row"], line["formulation"]) for line in csv.DictReader(file)}


def _append(table, line):
    new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, line)
        if new:
            writer.writeheader()
        writer.writerow(line)
