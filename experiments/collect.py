# SPDX-License-Identifier: Apache-2.0
"""Runs a sweep and collects it into a CSV file. Runs that are done in the file are not run again.

    python -m experiments.collect --config experiments/lohelp/sweep.py --sweep grid \\
        --workdir runs/lohelp_grid --csv experiments/lohelp/grid.csv --slots 2

So a sweep goes on from the committed rows on another machine, without the workdirs of its runs.
Without ``--slots`` nothing is run: the file gets what the workdirs have now. Exit codes are those
of ``localglobal sweep``, but a run that failed is a row like others (PROTOCOL.md, rule 4).
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence

from experiments import protocol
from localglobal_jax.checkpoints import workdir
from localglobal_jax.cli import main as command_line
from localglobal_jax.launch import expand, summary
from localglobal_jax.launch.exit_codes import ExitCode


def identity(name: str) -> str:
    """Returns the part of a run's name that is a function of its overrides."""
    return name.rpartition("-")[2]


def merged(names: Iterable[str], *parts: Iterable[protocol.Row]) -> list[protocol.Row]:
    """Returns the row of each run: of the first part in which it is done, else of the last."""
    found: dict[str, protocol.Row] = {}
    for row in (row for part in parts for row in part):
        key = identity(row["name"])
        if key not in found or found[key]["state"] != "done":
            found[key] = row
    return [found[identity(name)] for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the file lacks, and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("--config", "--workdir"):
        parser.add_argument(option, required=True)
    parser.add_argument("--sweep", default="sweep")
    parser.add_argument("--csv", type=pathlib.Path, required=True)
    parser.add_argument("--slots", help="runs at a time")
    args = parser.parse_args(arguments)
    names = [run.name for run in expand.expand(args.config, args.workdir, args.sweep).runs]
    known = protocol.read(args.csv)
    done = {identity(row["name"]) for row in known if row["state"] == "done"}
    left = [name for name in names if identity(name) not in done]
    if not left:
        return ExitCode.DONE
    words = ["sweep", "--config", args.config, "--sweep", args.sweep, "--workdir", args.workdir]
    words += ["--only", *left]
    code = command_line.main([*words, "--slots", args.slots]) if args.slots else ExitCode.DONE
    if code == ExitCode.WRONG:
        return code
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "left.csv")
        command_line.main([*words, "--collect", str(file)])
        rows = protocol.read(file)
    text = summary.shown([dict(row) for row in merged(names, known, rows)], "csv")
    workdir.write_atomically(args.csv.absolute(), text + "\n")
    return ExitCode.DONE if code == ExitCode.FAILED else code


if __name__ == "__main__":
    sys.exit(main())
