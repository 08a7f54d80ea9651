# SPDX-License-Identifier: Apache-2.0
"""Damages every file of real workdirs in many ways, and checks that each damage is found.

    python experiments/stress/faults/corrupt.py --out corrupt.csv --work /tmp/corrupt

First it trains a little, images and text. Then, for every file of the newest checkpoint: flipped
bits (single ones anywhere, the first, the last, several at once), a shorter file, an empty one,
none. Each time a resuming run must name the damaged file or leaf and take the step before, bit
for bit; ``inspect --verify`` must find it. Then flips that the list of checksums already knows:
only the digests of the leaves can tell. Then all steps at once, in a real process. Then the files
beside the checkpoints: each damage is found, or changes no value. OUT gets a line
for every file, the work directory's results.jsonl one for every damage.
"""

import argparse
import collections
import csv
import json
import logging
import pathlib
import shutil
import subprocess

import numpy as np
import runs
from damage import SHORT, Checkpointed


def train(kind, folder):
    """A run of nine steps that keeps three of them."""
    if not (folder / "model_card.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        arguments = runs.arguments(kind, folder, **SHORT)
        environment = runs.environment(fast_compile=True)
        subprocess.run(runs.command(arguments), env=environment, check=True, capture_output=True)
    copy = folder.with_name(f"{kind}-damaged")
    shutil.rmtree(copy, ignore_errors=True)
    return Checkpointed(kind, shutil.copytree(folder, copy))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="csv of results")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where runs are made")
    parser.add_argument("--flips", type=int, default=12, help="single random bits of each file")
    parser.add_argument("--kinds", nargs="+", choices=runs.RUNS, default=list(runs.RUNS))
    args = parser.parse_args()
    logging.getLogger("localglobal_jax").propagate = False  # hundreds of errors, all recorded
    args.work.mkdir(parents=True, exist_ok=True)
    table = collections.defaultdict(collections.Counter)
    with (args.work / "results.jsonl").open("w") as out:
        for kind in args.kinds:
            made, rng = train(kind, args.work / kind), np.random.default_rng(0)
            for results in (
                made.every_file(rng, args.flips),
                made.listed(rng, args.flips),
                made.beside(rng, 10 * args.flips),
                made.all_steps(rng),
            ):
                for result in results:
                    out.write(json.dumps({"kind": kind, **result}) + "\n")
                    out.flush()
                    count(table[kind, result["what"], result.get("file", "")], result)
    write(table, args.out)
    missed = sum(counts["missed"] for counts in table.values())
    print(json.dumps({"tried": sum(c["tried"] for c in table.values()), "missed": missed}))
    return 1 if missed else 0


def count(counts, result):
    """Adds one result to a line of the table."""
    counts["tried"] += 1
    counts["bits flipped"] += "bit" in result["damage"]
    kind = "missed" if not result["ok"] else "harmless" if result.get("harmless") else "found"
    counts[kind] += 1
    if kind == "missed":
        print("MISSED", json.dumps(result), flush=True)


def write(table, out):
    """The table, a line for every file."""
    columns = ("tried", "bits flipped", "found", "harmless", "missed")
    with out.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["run", "what", "file", *columns])
        for key, counts in table.items():
            lines.writerow([*key, *(counts[column] for column in columns)])


if __name__ == "__main__":
    raise SystemExit(main())
