# SPDX-License-Identifier: Apache-2.0
"""Runs the stages of the protocol (PROTOCOL.md) of a study, and writes their CSV files beside it.

    python -m experiments.tune --config experiments/lohelp/sweep.py --workdir runs/lohelp --slots 2

Each stage reads the CSV files of those before. A stage that grows, because a model chose an end of
the grid, is run again. Runs that are done in a CSV file are not run again, so the same command goes
on from the committed rows on another machine too, without the workdirs of their runs.
``--collect`` runs nothing: the files get the state of the workdirs.

Exit codes are those of ``localglobal sweep``, but a run that failed is a row like others (rule 4).
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


def left(names: Iterable[str], rows: Iterable[protocol.Row]) -> list[str]:
    """Returns the names of the runs that no row has as done."""
    done = {identity(row["name"]) for row in rows if row["state"] == "done"}
    return [name for name in names if identity(name) not in done]


def merged(names: Iterable[str], *parts: Iterable[protocol.Row]) -> list[protocol.Row]:
    """Returns the row of each run: of the first part in which it is done, else of the last."""
    found: dict[str, protocol.Row] = {}
    for row in (row for part in parts for row in part):
        key = identity(row["name"])
        if key not in found or found[key]["state"] != "done":
            found[key] = row
    return [found[identity(name)] for name in names]


def run_stage(spec: str, stage: str, root: str, file: pathlib.Path, slots: str | None) -> int:
    """Runs what the CSV file of a stage lacks, and collects it; without `slots`, only collects.

    Returns:
      The exit code of the sweep.
    """
    code, tried = int(ExitCode.DONE), set[str]()
    while True:
        known = protocol.read(file)
        names = [run.name for run in expand.expand(spec, root, stage).runs]
        lacking = [name for name in left(names, known) if name not in tried]
        if not lacking:
            return code
        tried.update(lacking)
        words = ["sweep", "--config", spec, "--sweep", stage, "--workdir", root, "--only", *lacking]
        if slots:
            code = command_line.main([*words, "--slots", slots])
        if code == ExitCode.WRONG:
            return code
        with tempfile.TemporaryDirectory() as folder:
            new = pathlib.Path(folder, "new.csv")
            command_line.main([*words, "--collect", str(new)])
            rows = merged(names, known, protocol.read(new))
        text = summary.shown([dict(row) for row in rows], "csv")
        workdir.write_atomically(file.absolute(), text + "\n")
        if code not in (ExitCode.DONE, ExitCode.FAILED) or not protocol.is_tried(rows):
            return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages one after the other, as far as their runs end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the sweep.py of a study")
    parser.add_argument("--workdir", required=True, help="a folder for each stage is made in it")
    parser.add_argument("--slots", default="1", help="runs at a time; default: 1")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    config, _, arg = args.config.partition(":")
    for stage in protocol.STAGES:
        file = protocol.stage_file(pathlib.Path(config).parent, stage, arg)
        slots = None if args.collect else args.slots
        code = run_stage(args.config, stage, f"{args.workdir}/{stage}", file, slots)
        if code not in (ExitCode.DONE, ExitCode.FAILED):
            return code
        if not protocol.is_tried(protocol.read(file)):
            break
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
