# SPDX-License-Identifier: Apache-2.0
"""Back end for TPU VMs without a cluster: queued resources, then one command on every host by ssh.

`pool` executes one script per run. The script requests the machines unless they exist, waits for
them, trains, and deletes them once the run is done or can never be. If the machines were taken away
the script exits with 42 and is restarted like any other run, which requests them again.
"""

import argparse
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence

from localglobal_jax.config.sweeps import cloud_name
from localglobal_jax.launch import execute, pool, shell, tpu
from localglobal_jax.launch.backend import (
    RETRIES,
    SLOTS,
    Launch,
    Option,
    Request,
    Say,
    Started,
    Target,
)
from localglobal_jax.launch.exit_codes import FINAL, ExitCode

NAME = "tpu-vm"
OPTIONS: tuple[Option, ...] = (
    SLOTS,
    RETRIES,
    *tpu.OPTIONS,
    Option("runtime", "version of the TPU software (that of the type)"),
    Option("spot", "use machines that may be preempted", action="store_true"),
    Option("setup", "command that every host runs first, 'pip install ...'"),
)
REQUIRED: tuple[str, ...] = ("zone", "tpu_type")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a local workdir."""
    tpu.check_workdir(args)


def target(args: argparse.Namespace) -> Target:
    """Returns the devices and hosts of one slice."""
    return tpu.target(args.tpu_type)


def launch(request: Request) -> Launch:
    """Returns one script per run."""
    args, env = request.args, request.env
    place = {"zone": args.zone, "project": args.project}
    options = {"accelerator": args.tpu_type, "version": args.runtime, "spot": args.spot}
    shown, files, commands = {}, {}, {}
    for run in request.runs:
        name, command = cloud_name(run.name, args.workdir), tpu.command(run)
        files[f"{run.name}.sh"] = script(
            name, command, setup=args.setup, env=env, **place, **options
        )
        text = exported(env) + remote(command, args.setup)
        call = [*ssh(name, **place), f"--command={text}"]
        shown[run.name] = (shell.quoted(create(name, **place, **options)), shell.quoted(call))
        commands[run.name] = ("bash", f"{run.name}.sh")
    return Launch(shown, files, commands)


def start(request: Request, environment: Mapping[str, str], say: Say) -> Started:
    """Runs the scripts here, one process per run, until all have ended."""
    execute.need("gcloud", "see https://cloud.google.com/sdk/docs/install")
    args = request.args
    logs = pathlib.Path("runs", "tpu-vm").absolute()  # of the waiting and of ssh
    execute.write(launch(request).files, logs)
    jobs = [
        pool.Job(run.name, ("bash", str(logs / f"{run.name}.sh")), logs / run.name)
        for run in request.runs
    ]
    slots = [pool.Slot()] * (args.slots or len(jobs))
    started = pool.run_jobs(jobs, slots, args.retries, environment, say)
    for run, outcome in started.runs.items():
        name = cloud_name(run, args.workdir)
        command = delete(name, zone=args.zone, project=args.project)
        if outcome["state"] == "failed":
            execute.call(command, environment)
        elif outcome["state"] == "stopped":
            say(f"kept     the machines of {run}, for resuming it; to delete them:")
            say(f"         {shlex.join(command)}")
    return started


# ---------------------------------------------------------------------------- commands

RUNTIMES = {  # from the documentation of Cloud TPU; --runtime overrides
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


def runtime(accelerator: str) -> str:
    """Returns the system image for an accelerator type."""
    kind = accelerator.partition("-")[0].replace("v5e", "v5litepod")
    return RUNTIMES.get(kind, "tpu-ubuntu2204-base")


def create(
    name: str,
    *,
    zone: str,
    accelerator: str,
    project: str | None = None,
    version: str | None = None,
    spot: bool = False,
) -> list[str]:
    """Returns the argument list that requests the machines of one run."""
    return [
        *("gcloud", "compute", "tpus", "queued-resources", "create", name),
        f"--node-id={name}",
        *where(zone, project),
        f"--accelerator-type={accelerator.replace('v5e-', 'v5litepod-')}",
        f"--runtime-version={version or runtime(accelerator)}",
        *(["--spot"] if spot else []),
        "--quiet",
    ]


def delete(name: str, *, zone: str, project: str | None = None) -> list[str]:
    """Returns the argument list that deletes the machines."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "delete", name]
    return [*command, *where(zone, project), "--force", "--quiet"]


def ssh(name: str, *, zone: str, project: str | None = None) -> list[str]:
    """Returns the argument list, without ``--command=``, that runs a command on every host."""
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", name),
        *where(zone, project),
        "--worker=all",
    ]


def exported(env: Mapping[str, str]) -> str:
    """Returns the shell code that exports `env` before a remote command."""
    return "".join(f"export {key}={shlex.quote(value)}; " for key, value in env.items())


def where(zone: str, project: str | None) -> list[str]:
    """Returns the options that every command takes."""
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


def remote(command: Sequence[str], setup: str | None = None) -> str:
    """Returns the shell code that a host executes; `exec` gives the run the recorded process id."""
    start = f"echo $$ > /tmp/localglobal.pid; exec {shell.quoted(command)}"
    return f"set -e; {setup}; {start}" if setup else start


STOP = 'kill -TERM "$(cat /tmp/localglobal.pid)"'


def script(
    name: str,
    command: Sequence[str],
    *,
    zone: str,
    accelerator: str,
    project: str | None = None,
    version: str | None = None,
    spot: bool = False,
    setup: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Returns the script of one run."""
    made = create(
        name, zone=zone, accelerator=accelerator, project=project, version=version, spot=spot
    )
    place = shell.quoted(where(zone, project))
    values = {
        "EXPORTS": "\n".join(shell.exports(env or {})),
        "REMOTE": shlex.quote(remote(command, setup)),
        "CREATE": shell.quoted(made),
        "DESCRIBE": f"gcloud compute tpus queued-resources describe {name} {place}",
        "DELETE": shell.quoted(delete(name, zone=zone, project=project)),
        "SSH": shell.quoted(ssh(name, zone=zone, project=project)),
        "STOP": shlex.quote(STOP),
        "NAMES": " ".join(env or {}),
        "FAILED": f"{ExitCode.FAILED:d}",
        "PREEMPTED": f"{ExitCode.PREEMPTED:d}",
        "OVER": "|".join(f"{code:d}" for code in (ExitCode.DONE, *FINAL)),
    }
    # In one pass: a value may contain the name of another placeholder.
    return re.sub(r"@([A-Z]+)@", lambda place: values[place[1]], BODY)


BODY = """\
#!/bin/bash
set -u
@EXPORTS@
state() { @DESCRIBE@ --format='value(state.state)' 2>/dev/null; }
create() { @CREATE@ || exit @FAILED@; }
remove() { @DELETE@; }
case "$(state)" in
  '') create ;;
  SUSPENDED|SUSPENDING|FAILED) remove; create ;;
esac
trap 'exit @PREEMPTED@' TERM  # while waiting: the request stays in the queue
until [ "$(state)" = ACTIVE ]; do
  case "$(state)" in FAILED) exit @FAILED@ ;; SUSPENDED) exit @PREEMPTED@ ;; esac
  sleep 30 & wait $!
done
environment=""
for name in @NAMES@; do environment+="export $name=${!name@Q}; "; done
@SSH@ --command="$environment"@REMOTE@ &
child=$!
stop() { @SSH@ --command=@STOP@; }
trap stop TERM
while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends wait too early
wait "$child"
code=$?
if [ "$code" -ne 0 ] && [ "$(state)" != ACTIVE ]; then exit @PREEMPTED@; fi  # the machines are gone
case "$code" in @OVER@) remove ;; esac
exit "$code"
"""
