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

from localglobal_jax.checkpoints import workdir
from localglobal_jax.cli import options
from localglobal_jax.config import schema, validation
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
    add("--collect", metavar="FILE.csv",
        help="write settings and last metrics of all runs; or .md, .tex, .json")  # fmt: skip
    add("--prune", action="store_true",
        help="list old checkpoints of finished runs, and workdirs of failed ones")  # fmt: skip
    add("--yes", action="store_true", help="with --prune: delete them")
    group = parser.add_argument_group("--sampler")
    more = group.add_argument
    more("--sampler", choices=("random", "tpe", "qmc"),
         help="draw the runs from search(), or search_NAME(), by Optuna [local]")  # fmt: skip
    more("--trials", type=int, metavar="N", help="with --sampler: runs, earlier ones included")
    more("--halving", action="store_true",
         help="with --sampler: stop runs by successive halving at evaluations")  # fmt: skip
    group = parser.add_argument_group("--summary")
    more = group.add_argument
    more("--summary", action="store_true",
         help="a table of settings, last and best value, time, disk and state")  # fmt: skip
    more("--metric", help="test/accuracy, --metric=-test/loss, ...; default: checkpoint.best")
    more("--group", nargs="+", metavar="FIELD",
         help="a line per setting of the other fields (seed): n, mean, sd, interval")  # fmt: skip
    more("--baseline", nargs="+", metavar="FIELD=VALUE",
         help="with --group: paired differences to that setting, or to a run's")  # fmt: skip
    more("--sort", metavar="COLUMN", help="ascending; descending with --sort=-COLUMN")
    more("--top", type=int, metavar="N", help="the first N lines")
    more(
        "--format",
        choices=("text", "markdown", "latex", "csv", "json"),
        help="default: text; also with --prune",
    )
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
    looks = args.status or args.collect or args.summary or args.prune
    options.check_workdir(args.workdir)
    _check_options(args)
    invalid: list[expand.Invalid] = []  # the others are checked, or looked at, too
    look = not args.dry_run  # which uses no network
    if args.sampler:
        return _search(args, looks)
    sweep = expand.expand(
        args.config, args.workdir, args.sweep, args.overrides, look=look, invalid=invalid
    )
    total = len(sweep.runs) + len(invalid)
    try:
        runs = expand.select(sweep.runs, args.only)
    except ValueError as error:
        told = [expand.all_of(invalid, total)] if invalid else []
        raise ValueError("\n".join([str(error), *told])) from None
    if looks:
        for run, reason in invalid:
            _say(f"wrong    {run}: {reason}")
        return _look(args, sweep, runs)
    backends.check(args)
    backend = backends.BACKENDS[args.backend]
    request = Request(args, sweep, runs, shell.environment(args.env))
    outside = dict(os.environ)  # before `_preview` changes it
    launch = backend.launch(request)
    rows = _preview(request, invalid)
    for notice in (*launch.notices, *_common_notices(args.overrides, runs)):
        _say(f"notice   {notice}")
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
    finished = [run for run in runs if run.name in done]
    request = dataclasses.replace(request, runs=left, finished=finished)
    started = backend.start(request, outside, _say)
    if args.json:
        print(json.dumps({"code": started.code, "runs": started.runs}))
    return started.code


def _common_notices(given: Mapping[str, str], runs: Sequence[expand.Description]) -> list[str]:
    """Returns the notices of overrides that all runs have in common."""
    found = [validation.notices(run.run, {**given, **run.overrides}) for run in runs]
    return [notice for notice in found[0] if all(notice in each for each in found)] if found else []


def _check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option without the one that reads it: a sweep would be started."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    table: tuple[str, ...] = ("metric", "group", "baseline", "sort", "top", "format")
    if args.prune:
        if other := next((n for n in ("status", "summary", "collect") if n in given), None):
            raise ValueError(f"--prune and --{other}: give one of them")
        if args.yes and args.dry_run:
            raise ValueError("--yes deletes, --dry_run does not: give one of them")
        table = table[:-1]  # its list has a format too
    owners = {
        **({} if args.summary else dict.fromkeys(table, "summary")),
        **({} if args.prune else {"yes": "prune"}),
        **({} if args.sampler else {"trials": "sampler", "halving": "sampler"}),
    }
    for option, owner in owners.items():
        if option in given:
            raise ValueError(f"--{option} belongs to --{owner}, which is not given")
    if args.baseline and not args.group:
        raise ValueError("--baseline needs --group FIELD, the field that pairs the runs (seed)")
    if args.top is not None and args.top < 1:
        raise ValueError(f"--top {args.top}: at least 1")
    if args.sampler and args.backend != "local":
        raise ValueError(f"--sampler draws runs on this machine, not with --backend {args.backend}")
    if args.sampler and args.only:
        raise ValueError("--only takes runs of a list: a search starts one after the other")
    for option, kind in (("collect", "file"), ("out", "folder")):
        if option in given:
            workdir.check_local(f"--{option}", getattr(args, option), kind)
    if args.collect:
        _check_file(args.collect)


def _check_file(given: str) -> None:
    """Raises ValueError unless ``--collect`` names a file that can be written, in a known form."""
    from localglobal_jax.launch import summary

    file = pathlib.Path(given).absolute()
    if not file.parent.is_dir():
        raise ValueError(f"--collect {given}: there is no such folder")
    if file.suffix not in summary.FILES:
        known = " ".join(filter(None, summary.FILES))
        raise ValueError(f"--collect {given}: give a name in {known}")


def _search(args: argparse.Namespace, looks: bool) -> int:
    """Draws and starts the runs of a search, or does what ``--status`` and the like name."""
    from localglobal_jax.launch import local, pool, search

    space = search.read_space(args.config, args.workdir, args.sweep, args.overrides)
    if looks:
        found = search.Study(space).sweep()
        if not found.runs:
            raise ValueError(f"{space.root}: no trial has been drawn yet")
        return _look(args, found, found.runs)
    backends.check(args)
    if args.trials is None or args.trials < 1:
        raise ValueError("--sampler needs --trials N, at least 1")
    env, outside = shell.environment(args.env), dict(os.environ)
    search.Study(space).check()
    # The first trials of a study that is forgotten are checked as a launch would check them.
    drawn = search.Study(space, args.sampler, args.trials, halving=args.halving, stored=False)
    runs = [run for _ in range(args.trials if args.dry_run else 1) if (run := drawn.draw())]
    if not runs:
        raise ValueError(f"no valid run among {args.trials} that were drawn: see the space")
    request = Request(args, expand.Sweep(space.prefix, space.base, tuple(runs)), runs, env)
    rows = _preview(request, ())
    if args.dry_run:
        masked = shell.masked(env)
        launch = local.launch(dataclasses.replace(request, env=masked))
        return _dry_run(args, rows, launch, masked)
    study = search.Study(space, args.sampler, args.trials, halving=args.halving)
    slots = local.machine_slots(args, {**outside, **env})
    started = pool.run_jobs(
        [],
        slots,
        args.retries,
        {**outside, **env},
        _say,
        source=study,
        ended=study.ended,
    )
    study.give_up_refused()
    if reasons := study.left_out():
        count = len(reasons) + len(study.states())
        _say(f"left out {len(reasons)} of {count} draws, with an invalid config: {reasons[-1]}")
    if args.json:
        print(json.dumps({"code": started.code, "runs": started.runs}))
    return started.code


def _prune(args: argparse.Namespace, runs: Sequence[expand.Description]) -> int:
    """Lists what may be deleted, and the bytes; with ``--yes`` deletes it."""
    from localglobal_jax.launch import prune, status, summary

    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(status.read, runs))
    found = prune.candidates(rows)
    total = sum(candidate.bytes for candidate in found)
    records, freed, code = [], 0, ExitCode.DONE
    for candidate in found:
        state, why = "would go", candidate.why
        if args.yes:
            try:
                state = "deleted" if prune.delete(candidate) else "in use"
            except OSError as error:  # the others go all the same
                state, why, code = "failed", str(error), ExitCode.FAILED
        freed += candidate.bytes if state == "deleted" else 0
        record = {"state": state, "disk": candidate.bytes, "folder": candidate.path}
        records.append({**record, "why": why})
    if args.json:
        print(json.dumps({"folders": records, "bytes": total, "freed": freed}))
        return code
    if records:
        print(summary.shown(records, args.format or "text"))
    if args.yes:
        print(f"{summary.size(freed)} of {summary.size(total)} freed")
    else:
        print(f"{len(found)} folders, {summary.size(total)}; --prune --yes deletes them")
    return code


def _look(args: argparse.Namespace, sweep: expand.Sweep, runs: Sequence[expand.Description]) -> int:
    """Prints or writes the state, the metrics and the summary of the runs."""
    from localglobal_jax.launch import status, summary

    if args.prune:
        return _prune(args, runs)
    fields = status.override_fields(sweep.runs)

    def read(run: expand.Description) -> dict[str, Any]:
        return status.read(run, fields=fields, whole=bool(args.summary or args.collect))

    with ThreadPoolExecutor(16) as pool:  # in a bucket, reading is waiting
        rows = list(pool.map(read, runs))
    if args.collect:
        file = pathlib.Path(args.collect).absolute()
        text = summary.shown(status.records(rows), summary.FILES[file.suffix])
        workdir.write_atomically(file, text + "\n")
        _say(f"wrote {args.collect}: {len(rows)} runs")
    records = _summary(args, sweep, rows) if args.summary else None
    if args.json:
        print(json.dumps({"runs": rows, **({} if records is None else {"summary": records})}))
    elif records is not None:
        print(summary.shown(records, args.format or "text"))
    elif args.status:
        print(status.table(rows))
    return ExitCode.DONE


def _summary(
    args: argparse.Namespace, sweep: expand.Sweep, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the lines of ``--summary``, one per run or, with ``--group``, per setting."""
    from localglobal_jax.launch import summary

    split = next(map(schema.evaluation_name, sweep.base.data.eval_splits), None)
    metric = summary.metric(rows, args.metric, sweep.base.checkpoint.best, split)
    if args.group:
        records = summary.groups(rows, metric, args.group, args.baseline or ())
    else:
        records = summary.runs(rows, metric)
    return summary.ordered(records, args.sort, args.top)


def _preview(request: Request, invalid: Sequence[expand.Invalid]) -> list[dict[str, Any]]:
    """Returns the description of every run. Raises ValueError with all invalid ones.

    `invalid`: those that are already known.
    """
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerator to the runs
    from localglobal_jax.launch import preview

    previewed = preview.Preview(request.sweep.base, backends.target(request.args))
    rows, refused = [], list(invalid)
    for run in request.runs:
        try:
            rows.append(previewed.row(run))
        except ValueError as error:
            name = f"{run.name} ({expand.shown(run.overrides)})"
            refused.append(expand.Invalid(name, str(error)))
    if refused:
        raise ValueError(expand.all_of(refused, len(request.runs) + len(invalid)))
    return rows


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
        "git": provenance.commit_of(folder),
        "env": dict(env),
        "scripts": sorted(launch.files),
        "notices": list(launch.notices),
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
