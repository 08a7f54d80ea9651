# SPDX-License-Identifier: Apache-2.0
"""TPU VMs without a cluster: queued resources, then the same command on every host by ssh.

One script per run, which `pool` executes: it asks for the machines unless they are there, waits for
them, trains, and gives them back once the run is done (or can never be). Machines that were taken
away are asked for again: the script then exits with 42, and is restarted like any other run.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from localglobal_jax.launch import shell

RUNTIMES = {  # of the documentation of Cloud TPU; --runtime overrides
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


def runtime(accelerator: str) -> str:
    """The image of the system for an accelerator type."""
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
    """The argument list that asks for the machines of one run."""
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
    """The argument list that gives the machines back."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "delete", name]
    return [*command, *where(zone, project), "--force", "--quiet"]


def ssh(name: str, *, zone: str, project: str | None = None) -> list[str]:
    """The argument list that runs something on every host; ``--command=`` is to follow."""
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", name),
        *where(zone, project),
        "--worker=all",
    ]


def exported(env: Mapping[str, str]) -> str:
    """What goes before a remote command to give it `env`."""
    return "".join(f"export {key}={shlex.quote(value)}; " for key, value in env.items())


def where(zone: str, project: str | None) -> list[str]:
    """Options of every command."""
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


def remote(command: Sequence[str], setup: str | None = None) -> str:
    """What a host executes; its own shell becomes the run, so that it can be told to stop."""
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
    """The script of one run."""
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
    }
    # In one pass: what is filled in may look like a place to fill in.
    return re.sub(r"@([A-Z]+)@", lambda place: values[place[1]], BODY)


BODY = """\
#!/bin/bash
set -u
@EXPORTS@
state() { @DESCRIBE@ --format='value(state.state)' 2>/dev/null; }
create() { @CREATE@ || exit 1; }
remove() { @DELETE@; }
case "$(state)" in
  '') create ;;
  SUSPENDED|SUSPENDING|FAILED) remove; create ;;
esac
trap 'exit 42' TERM  # while waiting: the request stays in the queue
until [ "$(state)" = ACTIVE ]; do
  case "$(state)" in FAILED) exit 1 ;; SUSPENDED) exit 42 ;; esac
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
if [ "$code" -ne 0 ] && [ "$(state)" != ACTIVE ]; then exit 42; fi  # the machines are gone
case "$code" in 0|2|3) remove ;; esac
exit "$code"
"""
