# SPDX-License-Identifier: Apache-2.0
"""Back end for TPUs in a Kubernetes cluster: ``xpk workload create`` for each run.

xpk pins old versions of common packages: install it in its own environment and put that on the
PATH. Its ``--dry-run --output-manifest-file FILE`` turns our command into the JobSet's manifest.
"""

import argparse
from collections.abc import Mapping, Sequence

from localglobal_jax.launch import execute, shell, tpu
from localglobal_jax.launch.backend import Launch, Option, Request, Say, Started, Target
from localglobal_jax.launch.exit_codes import ExitCode

NAME = "xpk"
OPTIONS: tuple[Option, ...] = (
    Option("cluster", "name of the cluster"),
    Option("image", "Docker image with localglobal_jax and the config file"),
    Option("num_slices", "slices of a run (1)", least=1),
    Option("priority", "very-low to very-high (medium)"),
    Option("max_restarts", "restarts of a run that was preempted (100)", least=0),
    *tpu.OPTIONS,
)
REQUIRED: tuple[str, ...] = ("cluster", "image", "tpu_type")
GRACE = 120  # seconds from SIGTERM to SIGKILL


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a local workdir."""
    tpu.check_workdir(args)


def target(args: argparse.Namespace) -> Target:
    """Returns the devices and hosts of all slices."""
    return tpu.target(args.tpu_type, args.num_slices or 1)


def launch(request: Request) -> Launch:
    """Returns one command, and the same as a script, per run."""
    args, env = request.args, request.env
    commands = {
        run.name: tuple(
            arguments(
                run.cloud_name,
                tpu.command(run),
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
        for run in request.runs
    }
    shown = {name: (shell.quoted(argv),) for name, argv in commands.items()}
    files = {f"{name}.sh": script(argv, env) for name, argv in commands.items()}
    notices = tpu.notices(args.config, "--image")
    return Launch(shown, files, commands, image=args.image, notices=notices)


def start(request: Request, environment: Mapping[str, str], say: Say) -> Started:
    """Creates one workload after the other; existing ones stay as they are."""
    execute.need("xpk", "python -m venv xpk && xpk/bin/pip install xpk, put xpk/bin on the PATH")
    commands = launch(request).commands
    states, messages = {}, ""
    for run in request.runs:
        code, output = execute.call(commands[run.name], environment)
        exists = code and "already exists" in output
        states[run.name] = "exists" if exists else "failed" if code else "created"
        if code and not exists:
            messages += f"{shell.without(output, request.env)}\n"
    if "exists" in states.values():
        messages += "Existing workloads are kept, done or not: delete a workload to start it again."
    code = ExitCode.FAILED if "failed" in states.values() else ExitCode.DONE
    return execute.report(code, states, messages, say)


# ---------------------------------------------------------------------------- commands


def arguments(
    name: str,
    command: Sequence[str],
    *,
    cluster: str,
    tpu_type: str,
    image: str,
    slices: int = 1,
    project: str | None = None,
    zone: str | None = None,
    priority: str = "medium",
    restarts: int = 100,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Returns the argument list. A preempted run is restarted up to `restarts` times."""
    return [
        *("xpk", "workload", "create"),
        f"--workload={name}",
        f"--cluster={cluster}",
        *([f"--project={project}"] if project else []),
        *([f"--zone={zone}"] if zone else []),
        f"--tpu-type={tpu.accelerator(tpu_type)}",
        f"--num-slices={slices}",
        f"--docker-image={image}",
        f"--priority={priority}",
        f"--max-restarts={restarts}",
        f"--restart-on-exit-codes={ExitCode.PREEMPTED:d}",
        f"--termination-grace-period-seconds={GRACE}",
        *(f"--env={key}={value}" for key, value in (env or {}).items()),
        # xpk puts it into a subshell and signals that: with `exec` it is the run itself.
        f"--command=exec {shell.quoted(command)}",
    ]


def script(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """Returns the command as a script, which takes secrets from its environment."""
    words = []
    for word in argv:
        name = word.removeprefix("--env=").partition("=")[0]
        secret = word.startswith("--env=") and name in shell.secrets(env)
        words.append(f'--env={name}="${name}"' if secret else shell.quoted([word]))
    lines = shell.exports(shell.secrets(env))
    return "\n".join(["#!/bin/bash", "set -eu", *lines, "exec " + " \\\n  ".join(words), ""])
