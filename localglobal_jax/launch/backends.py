# SPDX-License-Identifier: Apache-2.0
"""The back ends side by side: which options each takes, and what it would start. Pure."""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.config.sweeps import cloud_name
from localglobal_jax.launch import shell, slurm, tpu_vm, xpk
from localglobal_jax.launch.expand import Description, Sweep
from localglobal_jax.profiling import topologies

# option -> the back ends it is for, and its help
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "slots": (("local", "slurm", "tpu-vm"), "runs at a time (local: 1; slurm, tpu-vm: all)"),
    "retries": (("local", "tpu-vm"), "of a run that crashed (2)"),
    "cores_per_slot": (("local",), "CPU cores of a slot (an equal share)"),
    "gpus_per_slot": (("local",), "GPUs of a slot (an equal share)"),
    "partition": (("slurm",), "of the cluster"),
    "account": (("slurm",), "to charge"),
    "qos": (("slurm",), "quality of service"),
    "time": (("slurm",), "limit of one piece of a run, 4:00:00; it saves and is queued again"),
    "nodes": (("slurm",), "of a run (1)"),
    "gpus": (("slurm",), "of a node (0)"),
    "cpus": (("slurm",), "cores per process"),
    "mem": (("slurm",), "memory of a node, 64G"),
    "sbatch": (("slurm",), "another option of sbatch, --sbatch=--exclusive; may be repeated"),
    "cluster": (("xpk",), "name of the cluster"),
    "image": (("xpk",), "Docker image with localglobal_jax and the config file"),
    "num_slices": (("xpk",), "of a run (1)"),
    "priority": (("xpk",), "very-low to very-high (medium)"),
    "max_restarts": (("xpk",), "of a run that was preempted (100)"),
    "tpu_type": (("xpk", "tpu-vm"), "v5litepod-256, v5p-128, ..."),
    "project": (("xpk", "tpu-vm"), "of Google Cloud (gcloud's own)"),
    "zone": (("xpk", "tpu-vm"), "of Google Cloud"),
    "runtime": (("tpu-vm",), "version of the TPU software (that of the type)"),
    "spot": (("tpu-vm",), "machines that may be taken away"),
    "setup": (("tpu-vm",), "command that every host runs first, 'pip install ...'"),
}
REQUIRED = {"xpk": ("cluster", "image", "tpu_type"), "tpu-vm": ("zone", "tpu_type")}
NUMBERS = {"slots", "retries", "cores_per_slot", "gpus_per_slot", "nodes", "gpus", "cpus"}
NUMBERS |= {"num_slices", "max_restarts"}
MAY_BE_ZERO = {"retries", "gpus", "gpus_per_slot", "max_restarts"}
NAMES = ("local", "slurm", "xpk", "tpu-vm")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a back end would start. `shown`: the commands of each run, by name, for people."""

    shown: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]  # scripts, by file name; no secrets
    commands: Mapping[str, tuple[str, ...]]  # what is executed, by name of a run or a script


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that is for another back end, missing, or too small."""
    for option, (names, _) in OPTIONS.items():
        given = getattr(args, option)
        if given is not None and given is not False and args.backend not in names:
            raise ValueError(f"--{option} is for --backend {' or '.join(names)}")
    for option in ("devices", *sorted(NUMBERS)):
        least = 0 if option in MAY_BE_ZERO else 1
        if (given := getattr(args, option)) is not None and given < least:
            raise ValueError(f"--{option} {given}: at least {least}")
    if args.backend in ("xpk", "tpu-vm") and not is_remote(args.workdir):
        raise ValueError(
            f"--backend {args.backend} needs a --workdir that outlives its machines: "
            "gs://BUCKET/PATH"
        )
    if args.backend == "slurm" and re.search(r"[\s%]", os.path.abspath(args.workdir)):
        raise ValueError(f"--workdir {args.workdir}: SLURM takes no blanks and no % in a path")
    if args.backend == "slurm" and re.search(r"\s", os.getcwd()):
        raise ValueError(
            f"SLURM takes no blanks in a path: start it elsewhere than {os.getcwd()!r}"
        )
    if args.backend == "local" and args.out:
        raise ValueError("--out is for back ends that make scripts; local runs are started here")
    for option in REQUIRED.get(args.backend, ()):
        if not getattr(args, option):
            raise ValueError(f"--backend {args.backend} needs --{option}")


SINGLE = {"v5e", "v6e"}  # of these, up to 8 chips are one machine; else a machine has 4


class Target(NamedTuple):
    """Devices as JAX counts them, over all hosts of one run, and these hosts (processes)."""

    devices: int
    hosts: int = 1


def of_tpu(name: str, slices: int = 1) -> Target:
    """So many slices of ``v5litepod-256`` or ``v5p-128``, as the cloud names them."""
    if not re.fullmatch(r"v\w+-\d+", name):
        raise ValueError(f"--tpu_type {name}: want a name of the cloud, v5litepod-256 or v5p-128")
    found = topologies.parse(name)
    single = found.name.partition(":")[0] in SINGLE and found.chips <= 8
    return Target(found.devices * slices, (1 if single else max(1, found.chips // 4)) * slices)


def target(args: argparse.Namespace) -> Target | None:
    """Devices and hosts of a run; None: those that JAX finds here."""
    if args.devices:
        return Target(args.devices)
    if args.backend == "slurm":
        processes = (args.nodes or 1) * slurm.tasks_per_node(args.gpus or 0)
        return Target(processes, processes)  # one device each
    if args.backend in ("xpk", "tpu-vm"):
        return of_tpu(args.tpu_type, args.num_slices or 1)
    return None


def launch(
    args: argparse.Namespace, sweep: Sweep, runs: Sequence[Description], env: Mapping[str, str]
) -> Launch:
    """What `args` asks for. The environment `env` is given to every run."""
    here = (sys.executable, "-m", __package__.partition(".")[0])
    if args.backend == "local":
        commands = {run.name: (*here, *run.arguments) for run in runs}
        given = [f"{key}={value}" for key, value in env.items()]
        words = ["env", *given] if given else []
        shown = {name: (shell.quoted([*words, *argv]),) for name, argv in commands.items()}
        return Launch(shown, {}, commands)
    there = {r.name: ("localglobal", "train", "--distributed", *r.arguments[1:]) for r in runs}
    if args.backend == "slurm":
        return _slurm(args, sweep, runs, env, here)
    if args.backend == "xpk":
        commands = {
            run.name: tuple(
                xpk.arguments(
                    cloud_name(run.name, args.workdir),
                    there[run.name],
                    cluster=args.cluster,
                    tpu_type=args.tpu_type,
                    image=args.image,
                    slices=args.num_slices or 1,
                    project=args.project,
                    zone=args.zone,
                    priority=args.priority or "medium",
                    restarts=100 if args.max_restarts is None else args.max_restarts,
                    env=env,
                )
            )
            for run in runs
        }
        shown = {name: (shell.quoted(argv),) for name, argv in commands.items()}
        return Launch(
            shown, {f"{n}.sh": _xpk_script(a, env) for n, a in commands.items()}, commands
        )
    place = {"zone": args.zone, "project": args.project}
    files: dict[str, str] = {}
    pairs: dict[str, tuple[str, ...]] = {}
    for run in runs:
        options = {"accelerator": args.tpu_type, "version": args.runtime, "spot": args.spot}
        name = cloud_name(run.name, args.workdir)
        files[f"{run.name}.sh"] = tpu_vm.script(
            name, there[run.name], setup=args.setup, env=env, **place, **options
        )
        remote = tpu_vm.exported(env) + tpu_vm.remote(there[run.name], args.setup)
        ssh = [*tpu_vm.ssh(name, **place), f"--command={remote}"]
        made = tpu_vm.create(name, **place, **options)
        pairs[run.name] = (shell.quoted(made), shell.quoted(ssh))
    return Launch(pairs, files, {run.name: ("bash", f"{run.name}.sh") for run in runs})


def _slurm(
    args: argparse.Namespace,
    sweep: Sweep,
    runs: Sequence[Description],
    env: Mapping[str, str],
    here: Sequence[str],
) -> Launch:
    processes = (args.nodes or 1) * slurm.tasks_per_node(args.gpus or 0)
    many = ("--distributed",) if processes > 1 else ()
    commands = {run.name: (*here, run.arguments[0], *many, *run.arguments[1:]) for run in runs}
    if is_remote(args.workdir):
        raise ValueError("--backend slurm needs a --workdir on the cluster's file system")
    named = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "time": args.time,
        "cpus-per-task": args.cpus,
        "mem": args.mem,
        "chdir": os.getcwd(),  # a config's path may be relative to here
    }
    options = [f"--{key}={value}" for key, value in named.items() if value]
    root = str(pathlib.Path(args.workdir).absolute())
    text = slurm.script(
        runs, commands, prefix=slurm_job(sweep.prefix, root), root=root,
        options=[*options, *(args.sbatch or ())], nodes=args.nodes or 1, gpus=args.gpus or 0,
        concurrent=args.slots, env=env,
    )  # fmt: skip
    shown = {name: (f"srun {shell.quoted(argv)}",) for name, argv in commands.items()}
    file = f"{sweep.prefix}.sbatch"
    return Launch(shown, {file: text}, {file: ("sbatch", "--parsable", file)})


def slurm_job(prefix: str, root: str) -> str:
    """The name of the array: of the sweep and of where it writes."""
    return f"{prefix}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


def _xpk_script(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """The command as a script; a secret is taken from the environment it is called in."""
    words = []
    for word in argv:
        name = word.removeprefix("--env=").partition("=")[0]
        secret = word.startswith("--env=") and name in shell.secrets(env)
        words.append(f'--env={name}="${name}"' if secret else shell.quoted([word]))
    lines = shell.exports(shell.secrets(env))
    return "\n".join(["#!/bin/bash", "set -eu", *lines, "exec " + " \\\n  ".join(words), ""])
