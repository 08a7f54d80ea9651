# SPDX-License-Identifier: Apache-2.0
"""Back end for this machine: runs are processes in slots, each with its own cores or GPUs."""

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence

from localglobal_jax.launch import pool, shell
from localglobal_jax.launch.backend import (
    RETRIES,
    SLOTS,
    Launch,
    Option,
    Request,
    Say,
    Started,
    Target,
    python_command,
)
from localglobal_jax.launch.expand import Description

NAME = "local"
OPTIONS: tuple[Option, ...] = (
    SLOTS,
    RETRIES,
    Option("cores_per_slot", "CPU cores of a slot (an equal share)", least=1),
    Option("gpus_per_slot", "GPUs of a slot (an equal share)", least=0),
)
REQUIRED: tuple[str, ...] = ()


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for ``--out``, and for slots that this machine does not have."""
    if args.out:
        raise ValueError("--out is for back ends that make scripts; local runs are started here")
    machine_slots(args, _environment(args))


def target(args: argparse.Namespace) -> Target | None:
    """Returns the GPUs of a slot; None without GPUs."""
    gpus = machine_slots(args, _environment(args))[0].gpus
    return Target(len(gpus)) if gpus else None


def launch(request: Request) -> Launch:
    """Returns one command per run; there are no scripts."""
    commands = {run.name: (*python_command(), *run.arguments) for run in request.runs}
    given = [f"{key}={value}" for key, value in request.env.items()]
    words = ["env", *given] if given else []
    shown = {name: (shell.quoted([*words, *argv]),) for name, argv in commands.items()}
    return Launch(shown, {}, commands)


def start(request: Request, environment: Mapping[str, str], say: Say) -> Started:
    """Runs the processes in slots and returns once all have ended."""
    jobs, environment = [job(run) for run in request.runs], {**environment, **request.env}
    slots, done = machine_slots(request.args, environment), len(request.finished)
    return pool.run_jobs(jobs, slots, request.args.retries, environment, say, done=done)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of the runs."""
    return {**os.environ, **shell.environment(args.env)}


def job(run: Description) -> pool.Job:
    """Returns the process of a run."""
    command = (*python_command(), *run.arguments)
    return pool.Job(run.name, command, pool.folder(run, NAME), *pool.progress(run))


# ---------------------------------------------------------------------------- slots


def machine_slots(
    args: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[pool.Slot, ...]:
    """Returns the slots of this machine for ``--slots`` and its kin. Raises ValueError."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    gpus = visible_gpus(environment, os.listdir("/dev") if os.path.isdir("/dev") else [])
    return slots(
        args.slots or 1,
        cores,
        gpus,
        cores_per_slot=args.cores_per_slot,
        gpus_per_slot=args.gpus_per_slot,
    )


def slots(
    count: int,
    cores: Sequence[int],
    gpus: Sequence[str] = (),
    *,
    cores_per_slot: int | None = None,
    gpus_per_slot: int | None = None,
) -> tuple[pool.Slot, ...]:
    """Splits `cores` and `gpus` over `count` slots: evenly, or as many to each as given.

    Two slots never share a GPU, since each process would reserve its memory. They share cores if
    there are more slots than cores. With `gpus_per_slot` 0 no slot sees a GPU. Raises ValueError if
    there are too few GPUs or cores.
    """
    each = len(gpus) // count if gpus_per_slot is None else gpus_per_slot
    if (gpus and not each and gpus_per_slot is None) or each * count > len(gpus):
        raise ValueError(
            f"{count} slots of {each or 1} GPUs need {max(each, 1) * count}, there are {len(gpus)}:"
            " lower --slots, or use cores alone with --gpus_per_slot 0"
        )
    width = cores_per_slot or max(1, len(cores) // count)
    if width > len(cores):
        raise ValueError(
            f"--cores_per_slot {width}: this process may use {len(cores)} cores, give at most that"
        )
    return tuple(
        pool.Slot(
            tuple(sorted(cores[(i * width + j) % len(cores)] for j in range(width))),
            tuple(gpus[i * each : (i + 1) * each]) if gpus else None,
        )
        for i in range(count)
    )


def visible_gpus(environment: Mapping[str, str], device_files: Sequence[str]) -> list[str]:
    """Returns the ids in CUDA_VISIBLE_DEVICES; without it, one id per ``/dev/nvidia<i>``.

    As for CUDA, the ids end at the first that is none: -1 hides all GPUs.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        ids = (gpu.strip() for gpu in environment["CUDA_VISIBLE_DEVICES"].split(","))
        return list(itertools.takewhile(lambda gpu: gpu and not gpu.startswith("-"), ids))
    numbers = sorted(int(f[len("nvidia") :]) for f in device_files if f[len("nvidia") :].isdigit())
    return [str(number) for number in numbers]
