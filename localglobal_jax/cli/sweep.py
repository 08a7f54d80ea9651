# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal sweep`: checks, shows, starts and follows the runs of a sweep."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.launch import backends, execute, expand, shell
from localglobal_jax.launch.backend import Launch, Request
from localglobal_jax.launch.exit_codes import ExitCode

NAME = "sweep"
HELP = "many runs of one config"
EXAMPLE = "--config experiments/coatnet_layouts/sweep.py --workdir runs/layouts --dry_run"
NOTES = """\
--dry_run checks and describes every run; it writes nothing and uses no network. A launch runs the
same checks first. Names are a function of the overrides, so the same command again resumes stopped
runs and skips finished ones. Exit codes: 0 all done (or handed over), 42 preempted, state saved,
2 a run is wrong (none was started), 1 a run failed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, and those of the back ends."""
    options.add_notes(parser, NOTES)
    options.add_config(parser)
    add = parser.add_argument
    add("--sweep", default="sweep", metavar="NAME",
        help="run sweep_NAME() of the file; default: sweep()")  # fmt: skip
    add("--workdir", required=True, metavar="ROOT", help="every run gets its own folder in it")
    add("--backend", choices=tuple(backends.BACKENDS), default="local", help="default: local")
    add("--only", nargs="+", metavar="GLOB|INDEX|A-B", help="some of the runs, by name or number")
    add("--dry_run", action="store_true", help="check and describe the runs, start nothing")
    add("--status", action="store_true", help="print the state of the runs")
    add("--collect", metavar="FILE.csv", help="write overrides and last metrics of all runs")
    add("--out", metavar="DIR", help="write scripts there instead of running anything")
    add(
        "--devices",
        type=int,
        metavar="N",
        help="devices of a run (given by the back end's options)",
    )
    add("--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="environment of every run, secrets printed masked; may be repeated")  # fmt: skip
    backends.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Starts the runs, or does what ``--status``, ``--dry_run`` and the like name."""
    sweep = expand.expand(args.config, args.workdir, args.sweep, args.overrides)
    runs = expand.select(sweep.runs, args.only)
    if args.status or args.collect:
        return _look(args, runs)
    backends.check(args)
    backend = backends.BACKENDS[args.backend]
    request = Request(args, sweep, runs, shell.environment(args.env))
    outside = dict(os.environ)  # before `_preview` changes it
    launch = backend.launch(request)
    rows = _preview(request)
    if args.dry_run:
        env = shell.masked(request.env)
        return _dry_run(args, rows, backend.launch(dataclasses.replace(request, env=env)), env)
    if args.out:
        paths = execute.write(launch.files, pathlib.Path(args.out))
        print(json.dumps({"files": paths}) if args.json else "\n".join(paths))
        return ExitCode.DONE
    from localglobal_jax.launch import status

    by_name = {run.name: run.run for run in runs}
    for row in rows:
        if row["remote"]:  # only now: a dry run uses no network
            found = row["latest_step"] = status.latest_step(row["workdir"])
            row["steps"] = status.steps_of(by_name[row["name"]], row["workdir"], found)
    done = {
        row["name"] for row in rows if row["latest_step"] and row["latest_step"] >= row["steps"]
    }
    for name in sorted(done):
        _say(f"done     {name}: nothing to do")
    left = [run for run in runs if run.name not in done]
    request = dataclasses.replace(request, runs=left)
    started = backend.start(request, {**outside, **request.env}, _say)
    if args.json:
        print(json.dumps({"code": started.code, "runs": started.runs}))
    return started.code


def _look(args: argparse.Namespace, runs: Sequence[expand.Description]) -> int:
    """Prints or writes the state of the runs."""
    from localglobal_jax.launch import status

    if args.collect and not pathlib.Path(args.collect).absolute().parent.is_dir():
        raise ValueError(f"--collect {args.collect}: there is no such folder")
    with ThreadPoolExecutor(16) as pool:  # in a bucket, reading is waiting
        rows = list(pool.map(status.read, runs))
    if args.collect:
        from localglobal_jax.checkpoints import workdir

        workdir.write_atomically(pathlib.Path(args.collect), status.to_csv(rows))
        _say(f"wrote {args.collect}: {len(rows)} runs")
    if args.json:
        print(json.dumps({"runs": rows}))
    elif args.status:
        print(status.table(rows))
    return ExitCode.DONE


def _preview(request: Request) -> list[dict[str, Any]]:
    """Returns the description of every run. Raises ValueError for an invalid one."""
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerator to the runs
    from localglobal_jax.launch import preview

    previewed = preview.Preview(request.sweep.base, backends.target(request.args))
    return [previewed.row(run) for run in request.runs]


def _dry_run(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    launch: Launch,
    env: Mapping[str, str],
) -> int:
    """Prints the description and commands of every run, and the totals."""
    from localglobal_jax.launch import preview
    from localglobal_jax.training.reporting import provenance

    for row in rows:
        row["commands"] = launch.shown[row["name"]]
    folder = pathlib.Path(args.config.partition(":")[0]).absolute().parent
    about = {
        "backend": args.backend,
        "image": launch.image,
        "git": provenance.git(folder),
        "env": dict(env),
        "scripts": sorted(launch.files),
        **preview.totals(rows),
    }
    if args.json:
        print(json.dumps({"runs": rows, "totals": about}))
        return ExitCode.DONE
    for row in rows:
        print(preview.text(row, row["commands"]), end="\n\n")
    print(preview.summary(about))
    return ExitCode.DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
