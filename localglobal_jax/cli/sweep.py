# SPDX-License-Identifier: Apache-2.0
"""``localglobal sweep``: options, checks, output. Imports no jax before it is used."""

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from localglobal_jax.config import sweeps
from localglobal_jax.launch import backends, execute, expand, local, pool, shell, tpu_vm

EXAMPLE = "--config experiments/coatnet_layouts/sweep.py --workdir runs/layouts --dry_run"
NOTES = """\
--dry_run checks every run and prints what it would be; it writes nothing and touches no network.
The real launch checks the same first. Names are a function of the overrides, so the same command
again resumes what has stopped and leaves alone what is done. Exit codes: 0 all done (or handed
over), 42 asked to stop and saved, 2 a run is wrong (none was started), 1 a run failed."""


def add_options(sub: argparse.ArgumentParser) -> None:
    """All but ``--json`` and ``--config``."""
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = f"{NOTES}\n\n{sub.epilog}"
    add = sub.add_argument
    add("--sweep", default="sweep", metavar="NAME",
        help="which: sweep_NAME() of the file; default: sweep()")  # fmt: skip
    add("--workdir", required=True, metavar="ROOT", help="every run gets a folder of its own in it")
    add("--backend", choices=backends.NAMES, default="local", help="default: local")
    add("--only", nargs="+", metavar="GLOB|INDEX", help="some of the runs, by name or number")
    add("--dry_run", action="store_true", help="check, print, do nothing")
    add("--status", action="store_true", help="print what has become of the runs")
    add("--collect", metavar="FILE.csv", help="write overrides and last metrics of all runs")
    add("--out", metavar="DIR", help="write scripts there instead of running anything")
    add("--devices", type=int, metavar="N", help="of a run (what the back end's options say)")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="of every run; printed masked if it is a key or a token; may be repeated")  # fmt: skip
    groups = {name: sub.add_argument_group(f"--backend {name}") for name in backends.NAMES}
    for option, (names, text) in backends.OPTIONS.items():
        kind: dict[str, Any] = {"type": int, "metavar": "N"} if option in backends.NUMBERS else {}
        kind |= {"spot": {"action": "store_true"}, "sbatch": {"action": "append"}}.get(option, {})
        shared = f" [{', '.join(names)}]" if len(names) > 1 else ""
        groups[names[0]].add_argument(f"--{option}", help=text + shared, **kind)


def run(args: argparse.Namespace) -> int:
    """Runs, or what else was asked for; returns the exit code."""
    sweep = expand.expand(args.config, args.workdir, args.sweep, args.overrides)
    runs = expand.select(sweep.runs, args.only)
    if args.status or args.collect:
        return _look(args, runs)
    backends.check(args)
    env = shell.environment(args.env)
    outside = dict(os.environ)  # before we change it for ourselves
    slots = _slots(args, outside)
    launch = backends.launch(args, sweep, runs, env)
    rows = _preview(args, sweep, runs, slots)
    if args.dry_run:
        env = shell.masked(env)
        return _dry_run(args, rows, backends.launch(args, sweep, runs, env), env)
    if args.out:
        paths = execute.write(launch.files, pathlib.Path(args.out))
        if not paths:
            raise ValueError("--out is for back ends that have scripts, which local has not")
        print(json.dumps({"files": paths}) if args.json else "\n".join(paths))
        return 0
    from localglobal_jax.launch import status

    for row in rows:
        if row["remote"]:  # asked only now: a dry run touches no network
            row["latest_step"] = status.latest_step(row["workdir"])
    done = {
        row["name"] for row in rows if row["latest_step"] and row["latest_step"] >= row["steps"]
    }
    for name in sorted(done):
        _say(f"done     {name}: nothing to do")
    left = [run for run in runs if run.name not in done]
    environment = {**outside, **env}
    if args.backend == "slurm":
        return _submit(args, sweep, left, env, environment)
    if args.backend == "xpk":
        return _create(args, launch, left, env, environment)
    return _pool(args, left, launch, slots, environment)


def _look(args: argparse.Namespace, runs: list[expand.Description]) -> int:
    from localglobal_jax.launch import status

    if args.collect and not pathlib.Path(args.collect).absolute().parent.is_dir():
        raise ValueError(f"--collect {args.collect}: there is no such folder")
    try:
        rows = [status.read(described) for described in runs]
    except ImportError as error:
        raise ValueError(f"--workdir {args.workdir}: {error} (the extra gcs)") from None
    if args.collect:
        from localglobal_jax.checkpoints import workdir

        workdir.write_atomically(pathlib.Path(args.collect), status.to_csv(rows))
        _say(f"wrote {args.collect}: {len(rows)} runs")
    if args.json:
        print(json.dumps({"runs": rows}))
    elif args.status:
        print(status.table(rows))
    return 0


def _slots(args: argparse.Namespace, environment: Mapping[str, str]) -> list[local.Slot]:
    """Of this machine; for machines elsewhere, as many as wait here for one each."""
    if args.backend != "local":
        return [local.Slot()] * (args.slots or 0)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    gpus = local.visible_gpus(environment, os.listdir("/dev") if os.path.isdir("/dev") else [])
    return local.slots(
        args.slots or 1,
        cores,
        gpus if args.gpus_per_slot != 0 else (),
        cores_per_slot=args.cores_per_slot,
        gpus_per_slot=args.gpus_per_slot,
    )


def _preview(
    args: argparse.Namespace,
    sweep: expand.Sweep,
    runs: list[expand.Description],
    slots: list[local.Slot],
) -> list[dict[str, Any]]:
    """Of every run, all of them right."""
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is for the runs
    from localglobal_jax.launch import preview
    from localglobal_jax.launch.backends import Target

    target = backends.target(args)
    if target is None and slots and slots[0].gpus:
        target = Target(len(slots[0].gpus))
    looker = preview.Preview(sweep.base, target)
    return [looker.row(described) for described in runs]


def _dry_run(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    launch: backends.Launch,
    env: Mapping[str, str],
) -> int:
    from localglobal_jax.launch import preview
    from localglobal_jax.training.reporting import provenance

    for row in rows:
        row["commands"] = launch.shown[row["name"]]
    folder = pathlib.Path(args.config.partition(":")[0]).absolute().parent
    about = {
        "backend": args.backend,
        "image": args.image,
        "git": provenance.git(folder),
        "env": dict(env),
        "scripts": sorted(launch.files),
        **preview.totals(rows),
    }
    if args.json:
        print(json.dumps({"runs": rows, "totals": about}))
        return 0
    for row in rows:
        print(preview.text(row, row["commands"]), end="\n\n")
    print(preview.summary(about))
    return 0


def _submit(
    args: argparse.Namespace,
    sweep: expand.Sweep,
    runs: list[expand.Description],
    env: Mapping[str, str],
    environment: Mapping[str, str],
) -> int:
    """SLURM: what is neither done nor in the queue."""
    execute.need("sbatch")
    root = pathlib.Path(args.workdir).absolute()
    waiting = set()
    job = backends.slurm_job(sweep.prefix, str(root))
    for array, task in execute.queued(job, environment):
        # A sweep that grew has other numbers than the array that waits: names tell which is which.
        names = root / f"slurm-{array}.json"
        known = json.loads(names.read_text()) if names.exists() else {}
        waiting.add(known.get(str(task), ""))
    left = [run for run in runs if run.name not in waiting]
    code, output = 0, ""
    if left:
        launch = backends.launch(args, sweep, left, env)
        (file,) = execute.write(launch.files, root)
        code, output = execute.call(["sbatch", "--parsable", file], environment)
    if output and not code:
        numbers = {run.index: run.name for run in left}
        (root / f"slurm-{output.partition(';')[0]}.json").write_text(json.dumps(numbers))
    new = "failed" if code else "queued"
    states = {run.name: new if run in left else "already" for run in runs}
    _report(args, 1 if code else 0, states, shell.without(output, env))
    return 1 if code else 0


def _report(args: argparse.Namespace, code: int, states: Mapping[str, str], output: str) -> None:
    """What has become of every run; what the tool said."""
    for name, state in states.items():
        _say(f"{state:<8} {name}")
    _say(output)
    if args.json:
        print(json.dumps({"code": code, "runs": {k: {"state": v} for k, v in states.items()}}))


def _create(
    args: argparse.Namespace,
    launch: backends.Launch,
    runs: list[expand.Description],
    env: Mapping[str, str],
    environment: Mapping[str, str],
) -> int:
    """xpk: one workload after the other. One that exists is left alone."""
    execute.need("xpk")
    states, said = {}, ""
    for described in runs:
        code, output = execute.call(launch.commands[described.name], environment)
        there = code and "already exists" in output
        states[described.name] = "exists" if there else "failed" if code else "created"
        said += f"{shell.without(output, env)}\n" if code and not there else ""
    failed = int("failed" in states.values())
    if "exists" in states.values():
        said += "What exists is left alone, done or not: delete a workload to start it again."
    _report(args, failed, states, said)
    return failed


def _pool(
    args: argparse.Namespace,
    runs: list[expand.Description],
    launch: backends.Launch,
    slots: list[local.Slot],
    environment: Mapping[str, str],
) -> int:
    """Here, or from here: processes in slots."""
    folders = {described.name: pathlib.Path(described.workdir) for described in runs}
    commands = dict(launch.commands)
    if args.backend == "tpu-vm":
        execute.need("gcloud")
        logs = pathlib.Path("runs", "tpu-vm").absolute()  # of the waiting and the ssh
        execute.write(launch.files, logs)
        folders = {name: logs / name for name in folders}
        commands = {name: ("bash", str(logs / f"{name}.sh")) for name in folders}
        slots = slots or [local.Slot()] * len(runs)
    jobs = [pool.Job(name, commands[name], folder) for name, folder in folders.items()]
    retries = 2 if args.retries is None else args.retries
    workers = pool.Pool(slots, retries, environment, _say)
    outcomes = workers.run(jobs)
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    busy = any(outcome.state == "busy" for outcome in outcomes.values())
    code = 42 if workers.stopped else 1 if failed or busy else 0
    if args.backend == "tpu-vm":
        _give_back(args, outcomes, environment)
    if args.json:
        print(json.dumps({"code": code, "runs": {k: vars(v) for k, v in outcomes.items()}}))
    ended = sum(outcome.state == "done" for outcome in outcomes.values())
    _say(f"{ended} of {len(jobs)} done, {len(failed)} failed")
    return code


def _give_back(
    args: argparse.Namespace, outcomes: Mapping[str, Any], environment: Mapping[str, str]
) -> None:
    """The machines of runs that failed for good; of those that were stopped, says how."""
    for run, outcome in outcomes.items():
        name = sweeps.cloud_name(run, args.workdir)
        command = tpu_vm.delete(name, zone=args.zone, project=args.project)
        if outcome.state == "failed":
            execute.call(command, environment)
        elif outcome.state == "stopped":
            _say(f"kept     the machines of {run}, for when it goes on; to give them back:")
            _say(f"         {shlex.join(command)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
