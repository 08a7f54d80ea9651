# SPDX-License-Identifier: Apache-2.0
"""Back end for SLURM: ``sbatch`` array scripts, one task of an array per run.

A cluster limits the indices of an array (MaxArraySize, 1001 by default), so a script has up to
`ARRAY` runs, numbered from 0 within it; a larger sweep is several scripts.

Two minutes before its time limit, or when it is preempted, the batch shell gets SIGTERM and passes
it to all processes of the run. These save and exit with 42, and the task is queued again. Any other
exit code ends the task, so a wrong config is not queued for ever.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence

from localglobal_jax.checkpoints import workdir
from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.launch import execute, shell
from localglobal_jax.launch.backend import (
    SLOTS,
    Launch,
    Option,
    Request,
    Say,
    Started,
    Target,
    python_command,
)
from localglobal_jax.launch.exit_codes import ExitCode
from localglobal_jax.launch.expand import Description
from localglobal_jax.launch.pool import ATTEMPTS, MOST_IDLE

NAME = "slurm"
OPTIONS: tuple[Option, ...] = (
    SLOTS,
    Option("partition", "partition of the cluster"),
    Option("account", "account to charge"),
    Option("qos", "quality of service"),
    Option("time", "time limit of one task, 4:00:00; the run saves and is queued again"),
    Option("nodes", "nodes of a run (1)", least=1),
    Option("gpus", "GPUs of a node (0)", least=0),
    Option("cpus", "cores per process", least=1),
    Option("mem", "memory of a node, 64G"),
    Option(
        "sbatch",
        "another option of sbatch, exclusive or --sbatch=--mem-per-cpu=4G; may be repeated",
        action="append",
    ),
)
REQUIRED: tuple[str, ...] = ()
ARRAY = 1000  # runs of an array; see `limit`
GRACE = 120  # seconds between the signal and the end; a step and a checkpoint have to fit


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for paths that SLURM cannot use."""
    if is_remote(args.workdir):
        raise ValueError("--backend slurm needs a --workdir on the cluster's file system")
    if re.search(r"[\s%]", os.path.abspath(args.workdir)):
        raise ValueError(f"--workdir {args.workdir}: SLURM takes no blanks and no % in a path")
    if re.search(r"\s", os.getcwd()):
        raise ValueError(
            f"SLURM takes no blanks in a path: start it elsewhere than {os.getcwd()!r}"
        )


def target(args: argparse.Namespace) -> Target:
    """Returns one device per process."""
    processes = _processes(args)
    return Target(processes, processes)


def launch(request: Request) -> Launch:
    """Returns a script for every `ARRAY` runs."""
    return _launch(request, ARRAY)


def _launch(request: Request, size: int) -> Launch:
    args, here = request.args, python_command()
    many = ("--distributed",) if _processes(args) > 1 else ()
    commands = {
        run.name: (*here, run.arguments[0], *many, *run.arguments[1:]) for run in request.runs
    }
    named = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "time": args.time,
        "cpus-per-task": args.cpus,
        "mem": args.mem,
        "chdir": os.getcwd(),  # a path in the config may be relative to it
    }
    options = [f"--{key}={value}" for key, value in named.items() if value]
    root = str(pathlib.Path(args.workdir).absolute())
    options += [option if option.startswith("-") else f"--{option}" for option in args.sbatch or ()]
    parts = _parts(request.runs, size)
    files = {}
    for number, runs in enumerate(parts):
        part = f"-{number}" if len(parts) > 1 else ""
        files[f"{request.sweep.prefix}{part}.sbatch"] = script(
            runs, commands, prefix=job_name(request.sweep.prefix, root), root=root,
            options=options, nodes=args.nodes or 1, gpus=args.gpus or 0,
            concurrent=args.slots, env=request.env,
        )  # fmt: skip
    shown = {name: (f"srun {shell.quoted(argv)}",) for name, argv in commands.items()}
    return Launch(shown, files, {file: ("sbatch", "--parsable", file) for file in files})


def _parts(runs: Sequence[Description], size: int) -> list[Sequence[Description]]:
    return [runs[i : i + size] for i in range(0, len(runs), size)]


def start(request: Request, environment: Mapping[str, str], say: Say) -> Started:
    """Submits the runs that are not yet in the queue; ends at the first array that is refused.

    With ``--slots`` an array waits for the one before it, so that no more than these run at a time.
    """
    execute.need("sbatch", "it comes with SLURM: start this on a login node of the cluster")
    environment = {**environment, **request.env}  # which a task inherits
    root = pathlib.Path(request.args.workdir).absolute()
    tasks = queued(job_name(request.sweep.prefix, str(root)), environment)
    names = {array: _names(root, array) for array, _ in tasks}
    waiting = {names[array].get(str(task), "") for array, task in tasks}
    left = [run for run in request.runs if run.name not in waiting]
    states = {run.name: "already" if run not in left else "failed" for run in request.runs}
    ended, said, last = ExitCode.DONE, list[str](), ""
    size = limit(environment)
    files = _launch(dataclasses.replace(request, runs=left), size).files
    for runs, file in zip(_parts(left, size), execute.write(files, root), strict=True):
        after = [f"--dependency=afterany:{last}"] if last and request.args.slots else []
        code, output = execute.call(["sbatch", "--parsable", *after, file], environment)
        said.append(shell.without(output, request.env))
        if code:
            ended = ExitCode.FAILED
            break
        last = output.splitlines()[-1].partition(";")[0]  # a site may print notes before
        numbered = {task: run.name for task, run in enumerate(runs)}
        workdir.write_atomically(root / f"slurm-{last}.json", json.dumps(numbered))
        states |= {run.name: "queued" for run in runs}
    return execute.report(ended, states, "\n".join(said), say)


def _names(root: pathlib.Path, array: int) -> dict[str, str]:
    """Returns the name of the run of each task of an array that `start` has submitted.

    The index of a task is its place in its own script. Raises ValueError if the names are unknown.
    """
    file = root / f"slurm-{array}.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"array {array} of this sweep is in the queue, and {file} does not say which runs it "
            f"has ({error}), so they might be started twice: wait for its end, or scancel {array}"
        ) from error


def limit(environment: Mapping[str, str]) -> int:
    """Returns the largest number of runs of an array here: `ARRAY`, or less by MaxArraySize."""
    try:
        code, output = execute.call(["scontrol", "show", "config"], environment)
    except FileNotFoundError:
        return ARRAY
    found = None if code else re.search(r"^MaxArraySize\s*=\s*(\d+)", output, re.MULTILINE)
    return min(ARRAY, int(found[1])) if found and int(found[1]) else ARRAY


def queued(job: str, environment: Mapping[str, str]) -> set[tuple[int, int]]:
    """Returns (array, task) of the waiting and running jobs with that name.

    Raises OSError if ``squeue`` fails.
    """
    command = ["squeue", "--me", "--array", "--noheader", f"--name={job}", "--format=%F %K"]
    code, output = execute.call(command, environment)
    if code:
        raise OSError(f"squeue failed, so runs might be started twice: {output}")
    pairs = (line.split() for line in output.splitlines())
    return {(int(p[0]), int(p[1])) for p in pairs if len(p) == 2 and all(map(str.isdigit, p))}


# ---------------------------------------------------------------------------- the script


def job_name(prefix: str, root: str) -> str:
    """Returns the array's name, which depends on the sweep and on its workdir, without links."""
    return f"{prefix}-{hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:8]}"


def _processes(args: argparse.Namespace) -> int:
    return (args.nodes or 1) * tasks_per_node(args.gpus or 0)


def tasks_per_node(gpus: int) -> int:
    """Returns the processes of one run on a node: JAX under SLURM uses one GPU per process."""
    return max(1, gpus)


def script(
    runs: Sequence[Description],
    commands: Mapping[str, Sequence[str]],
    *,
    prefix: str,
    root: str,
    options: Sequence[str] = (),
    nodes: int = 1,
    gpus: int = 0,
    concurrent: int | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Returns the script. `commands`: by name of a run; `options`: of sbatch, ``--time=1:00:00``.

    The command of a run with several processes must contain ``--distributed``. Raises ValueError
    for an option with a line break.
    """
    tasks = tasks_per_node(gpus)
    most = f"%{concurrent}" if concurrent else ""
    lines = [
        f"--job-name={prefix}",
        f"--array=0-{len(runs) - 1}{most}",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:TERM@{GRACE}",
        f"--output={root}/slurm-%A_%a.txt",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *options,
    ]
    if broken := next((line for line in lines if re.search(r"[\r\n\0]", line)), None):
        raise ValueError(f"an option of sbatch is one line of a script: {broken!r} is not")
    cases = [
        f"  {task}) directory={shlex.quote(run.workdir)}\n"
        f"     command=({shell.quoted(commands[run.name])}) ;;"
        for task, run in enumerate(runs)
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# mkdir -p {shlex.quote(root)}; SLURM writes there, then: sbatch this file",
            *(f"#SBATCH {line}" for line in lines),
            "set -u",
            *shell.exports(env or {}),
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            f'  *) echo "no run ${{SLURM_ARRAY_TASK_ID}}" >&2; exit {ExitCode.WRONG:d} ;;',
            "esac",
            BODY.replace("ATTEMPTS", ATTEMPTS)
            .replace("PREEMPTED", f"{ExitCode.PREEMPTED:d}")
            .replace("MOST_IDLE", str(MOST_IDLE)),
        ]
    )


BODY = """\
record() { echo "{$1, \\"time\\": $(date +%s)}" >> "$directory/ATTEMPTS"; }
saved() { ls "$directory"/checkpoints/*/files.json 2>/dev/null; }
mkdir -p "$directory"
touch "$directory/log.txt"
log=$(wc -c < "$directory/log.txt")
record "\\"event\\": \\"start\\", \\"log\\": $log"
before=$(saved)
# srun takes all from sbatch but this.
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}
srun $cpus --kill-on-bad-exit=1 --output="$directory/log.txt" --open-mode=append "${command[@]}" &
child=$! asked=no
# To the processes of the run, not to srun, which would end them after a few seconds.
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends wait too early
wait "$child"
code=$?
[ "$before" = "$(saved)" ] && new=false || new=true
# A run that does not train yet ends by the signal: it has not failed.
case "$code:$asked" in
  0:*) next=done ;; PREEMPTED:*) next=restart ;; 143:yes) next=stopped ;; *) next=failed ;;
esac
# A run whose hosts never meet saves nothing: it is not queued for ever.
ends=$(grep '"end"' "$directory/ATTEMPTS" | tail -n $((MOST_IDLE - 1)))
idle=$(grep -c '"saved": false' <<< "$ends")
if [ "$next:$new" = restart:false ] && [ "$idle" -ge $((MOST_IDLE - 1)) ]; then
  echo "stopped MOST_IDLE times with nothing new saved: not queued again" >&2
  next=failed
elif [ "$next" = restart ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 1000 ]; then
  next=stopped
fi
record "\\"event\\": \\"end\\", \\"code\\": $code, \\"saved\\": $new, \\"next\\": \\"$next\\""
if [ "$next" = restart ]; then
  sleep 10  # a cluster that is not well is not asked every second
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
