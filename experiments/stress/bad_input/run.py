# SPDX-License-Identifier: Apache-2.0
"""Feeds thousands of bad inputs through the real paths; every attempt has its own process.

python experiments/stress/bad_input/run.py images [texts ...]     all groups: --help
python experiments/stress/bad_input/run.py --summary              a table of results/

Writes a line per attempt to results/GROUP.csv as it goes; started again, it continues.
"""

import argparse
import collections
import csv
import importlib
import pathlib
import shutil
import sys
import tempfile

import trial

GROUPS = ("images", "texts", "translate", "sets", "fields", "commands")
RESULTS = pathlib.Path(__file__).parent / "results"
COLUMNS = ("name", "kind", "good", "seconds", "megabytes", "message")


def run(group: str, every: int) -> None:
    """All trials of a group that have no result yet."""
    file = RESULTS / f"{group}.csv"
    RESULTS.mkdir(exist_ok=True)
    done = {row["name"] for row in rows(file)}
    if not file.exists():
        file.write_text(",".join(COLUMNS) + "\n")
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="bad_input-"))
    trials = importlib.import_module(f"run_{group}").trials
    try:
        for number, (name, function) in enumerate(trials(scratch)):
            if name in done or number % every:
                continue
            shutil.rmtree(scratch / "dirty", ignore_errors=True)
            found = trial.attempt(function)
            message = found.message.replace(str(scratch), "SCRATCH").replace("\n", " | ")
            numbers = f"{found.seconds:.2f}", f"{found.megabytes:.0f}"
            with file.open("a", newline="", encoding="utf-8") as out:
                line = (name, found.kind, found.good, *numbers, message[:200])
                csv.writer(out, lineterminator="\n").writerow([ascii_of(x) for x in line])
            if not found.good:
                print(f"{group}: {name}: {found.kind}: {message[:500]}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ascii_of(value: object) -> str:
    return str(value).encode("ascii", "backslashreplace").decode()


def rows(file: pathlib.Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def summary() -> str:
    heads = ("group", "tried", "works", "skipped, counted", "refused", "broken", "slowest")
    lines = [f"| {' | '.join(heads)} | most memory |", "|---" + "|---:" * len(heads) + "|"]
    for group in GROUPS:
        if not (found := rows(RESULTS / f"{group}.csv")):
            continue
        kinds = collections.Counter(row["kind"] for row in found if row["good"] == "True")
        broken = sum(row["good"] != "True" for row in found)
        slowest = max(float(row["seconds"]) for row in found)
        memory = max((float(row["megabytes"]) for row in found if row["megabytes"]), default=None)
        most = "not measured" if memory is None else f"{memory:.0f} MB"
        shown = (kinds["works"], kinds["skipped"], kinds["refused"], broken)
        cells = " | ".join(f"{n:,}" for n in (len(found), *shown))
        lines.append(f"| {group} | {cells} | {slowest:.1f} s | {most} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=(*GROUPS, []), help=", ".join(GROUPS))
    parser.add_argument("--every", type=int, default=1, help="only every n-th attempt")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    for group in args.groups:
        run(group, args.every)
    print(summary())
    return int(any(r["good"] != "True" for g in GROUPS for r in rows(RESULTS / f"{g}.csv")))


if __name__ == "__main__":
    sys.exit(main())
