# SPDX-License-Identifier: Apache-2.0
"""Back end for TPU VMs without a cluster: queued resources, then commands on every host by ssh.

`pool` executes one script per run. The script requests the machines unless they exist, waits for
them, runs the setup on every host, then trains on every host, and deletes the machines once the run
itself has ended for good. If the machines were taken away the script exits with 42 and is restarted
like any other run, which requests them again.

On a host the run does not depend on its ssh connection: it writes to ``~/.localglobal/log.txt``,
and the connection follows that file. A second connection, after the first was lost, finds the run
and follows it too. gcloud and ssh fail with the exit codes 1, 2 and 255, so a host reports the
run's own codes 1 to 3 as 101 to 103.
"""

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.checkpoints.workdir import absolute
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
from localglobal_jax.launch.expand import Description

NAME, SCRIPT = "tpu-vm", "run.sh"
OPTIONS: tuple[Option, ...] = (
    SLOTS,
    RETRIES,
    *tpu.OPTIONS,
    Option("runtime", "version of the TPU software (that of the type)"),
    Option("spot", "use machines that may be preempted", action="store_true"),
    Option("setup", "shell code that every host runs first; it must be able to run twice"),
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
        name, command = run.cloud_name, tpu.command(run)
        files[f"{run.name}.sh"] = script(
            name, command, setup=args.setup, env=env, **place, **options
        )
        shown[run.name] = (
            shell.quoted(create(name, **place, **options)),
            *(
                shell.quoted([*ssh(name, **place), f"--command={exported(env)}{text}"])
                for text in (prepare(args.setup, env), remote(command))
            ),
        )
        commands[run.name] = ("bash", f"{run.name}.sh")
    return Launch(shown, files, commands, notices=tpu.notices(args.config, "--setup"))


def start(request: Request, environment: Mapping[str, str], say: Say) -> Started:
    """Runs the scripts here, one process per run, until all have ended."""
    execute.need("gcloud", "see https://cloud.google.com/sdk/docs/install")
    args, by_name = request.args, {run.name: run for run in request.runs}
    place = {"zone": args.zone, "project": args.project}
    environment = {**environment, **shell.secrets(request.env)}  # the others are in the script
    _delete_finished(request.finished, place, environment, say)
    scripts, jobs = launch(request).files, []
    for run in request.runs:
        folder = pool.folder(run, NAME)  # of the script, and of the log of the waiting and of ssh
        (path,) = execute.write({SCRIPT: scripts[f"{run.name}.sh"]}, folder)
        jobs.append(pool.Job(run.name, ("bash", path), folder, *pool.progress(run)))
    slots = [pool.Slot()] * (args.slots or len(jobs))

    def ended(job: pool.Job, outcome: pool.JobResult) -> None:
        name = by_name[job.name].cloud_name
        ended_itself = outcome.code not in (NOT_READY, CONNECTION_LOST)
        if outcome.state == "done" or (outcome.state == "failed" and ended_itself):
            _delete(name, place, environment, say)  # unless the script has

    started = pool.run_jobs(
        jobs, slots, args.retries, environment, say, done=len(request.finished), ended=ended
    )
    for name, run in by_name.items():
        state, code = (started.runs[name][key] for key in ("state", "code"))
        if state == "stopped" or (state == "failed" and code in (NOT_READY, CONNECTION_LOST)):
            say(f"kept     the machines of {name}, for the next start; to delete them:")
            say(f"         {shlex.join(delete(run.cloud_name, **place))}")
    return started


def _delete_finished(
    runs: Sequence[Description], place: Mapping[str, Any], environment: Mapping[str, str], say: Say
) -> None:
    """Deletes the machines of runs that ended without their connection.

    The model card is a run's last file.
    """
    if not runs:
        return
    command = listed(**place)
    code, output = execute.call(command, environment)
    if code:
        say(f"unknown  whether machines of finished runs are left: {_last_line(output)}")
        say(f"         {shlex.join(command)}")
        return
    there = {line.rpartition("/")[2] for line in output.split()}
    for run in runs:
        if run.cloud_name in there and (absolute(run.workdir) / "model_card.md").exists():
            _delete(run.cloud_name, place, environment, say)


def _delete(name: str, place: Mapping[str, Any], environment: Mapping[str, str], say: Say) -> None:
    """Requests the deletion of machines that may be gone already; says if that is refused."""
    command = delete(name, **place)
    code, output = execute.call([*command, "--async"], environment)
    if code and not any(words in output for words in GONE):
        say(f"kept     the machines of {name} could not be deleted: {_last_line(output)}")
        say(f"         {shlex.join(command)}")


def _last_line(output: str) -> str:
    return (output.splitlines() or [""])[-1]


# ---------------------------------------------------------------------------- commands

RUNTIMES = {  # from the documentation of Cloud TPU; --runtime overrides
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


def runtime(accelerator: str) -> str:
    """Returns the system image for an accelerator type."""
    kind = tpu.accelerator(accelerator).partition("-")[0]
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
        f"--accelerator-type={tpu.accelerator(accelerator)}",
        f"--runtime-version={version or runtime(accelerator)}",
        *(["--spot"] if spot else []),
        "--quiet",
    ]


def delete(name: str, *, zone: str, project: str | None = None) -> list[str]:
    """Returns the argument list that deletes the machines."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "delete", name]
    return [*command, *where(zone, project), "--force", "--quiet"]


def listed(*, zone: str, project: str | None = None) -> list[str]:
    """Returns the argument list that prints the names of all requests, one per line."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "list", *where(zone, project)]
    return [*command, "--format=value(name)"]


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


def prepare(setup: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Returns the shell code that makes a host ready: `setup`, then a look for `localglobal`.

    Saves the folder and the exported variables at the end of the setup, without those of `env`, for
    the run. Exits with `NOT_READY`, whatever the exit code of the setup.
    """
    values = {"SETUP": shlex.quote(setup or ":"), "NAMES": " ".join(env or {})}
    return _filled(PREPARE, values)


def remote(command: Sequence[str]) -> str:
    """Returns the shell code that starts the run on a host unless it is there, and follows it."""
    return _filled(REMOTE, {"COMMAND": shell.quoted(command)})


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Replaces ``@NAME@``, in one pass: a value may contain the name of another placeholder."""
    values = {"NOT_READY": f"{NOT_READY:d}", **values}
    return re.sub(r"@([A-Z_]+)@", lambda place: values[place[1]], text)


# Exit codes of a script that are not the run's: after these the machines are kept.
NOT_READY, CONNECTION_LOST = 78, 255
GONE = ("NOT_FOUND", "was not found")  # words of gcloud about a name without machines

# The setup may end this shell at any place, with any code, and its last command may be `A && B`,
# at which `set -e` alone does not stop: the EXIT trap sees all of these.
PREPARE = """\
place=~/.localglobal
(umask 077; mkdir -p "$place") || exit @NOT_READY@
flock -n "$place/lock" true || exit 0  # the run of an earlier start goes on
rm -f "$place/environment" "$place/pid"
exec 9>>"$place/setup.lock"
flock 9  # a setup whose connection was lost may still run
trap 'echo "localglobal: the setup ended with exit code $? on $(hostname): nothing is started" >&2
  exit @NOT_READY@' EXIT
set -e
eval @SETUP@ 9>&-
result=$?
set +e
[ "$result" -eq 0 ] || (exit "$result") || exit
if ! type -P localglobal >/dev/null; then
  trap - EXIT
  echo "localglobal: not on the PATH of $(hostname): install it with --setup" >&2
  exit @NOT_READY@
fi
unset -v _ @NAMES@
(umask 077; { export -p; printf 'cd %q\\n' "$PWD"; } >"$place/environment")
trap - EXIT
exit 0"""

# The lock is inherited by the run, so it lasts as long as the run in whatever way that ends.
# `start` names a start: if it has ended, a second connection reports its exit code.
REMOTE = """\
place=~/.localglobal
exec 9>>"$place/lock"
if [ "$(cat "$place/start" 2>/dev/null)" != "${start-by hand}" ] && flock -n 9; then
  [ -z "${start-}" ] || echo "$start" >"$place/start"
  rm -f "$place/code" "$place/pid"
  lines=+$(($(cat "$place/log.txt" 2>/dev/null | wc -l) + 1))
  set -m  # a process group of its own
  (
    trap '' HUP
    . "$place/environment" || { echo @NOT_READY@ >"$place/code"; exit; }
    @COMMAND@ &
    echo $! >"$place/pid"
    [ "$(cat "$place/stop" 2>/dev/null)" != "${start-by hand}" ] || kill -TERM $!
    wait $!
    echo $? >"$place/code"
  ) </dev/null >>"$place/log.txt" 2>&1 &
  set +m
else
  echo "localglobal: the run was started on $(hostname) before: following its log"
  lines=10
fi
exec 9>&-
flock "$place/lock" true &
tail -s 0.2 -n "$lines" -F --pid=$! "$place/log.txt" 2>/dev/null
code=$(cat "$place/code" 2>/dev/null || echo 1)  # without the file the shell was killed
case "$code" in 1|2|3) code=$((code + 100)) ;; esac
exit $code"""

# A host that is not connected yet finds `stop` when it starts the run.
STOP = """\
echo "$start" >~/.localglobal/stop
pid=$(cat ~/.localglobal/pid 2>/dev/null) && kill -TERM "$pid\""""


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
        "ENVIRONMENT": "\n".join(_collected(env or {})),
        "NAME": name,
        "PREPARE": shlex.quote(prepare(setup, env)),
        "REMOTE": shlex.quote(remote(command)),
        "CREATE": shell.quoted(made),
        "DESCRIBE": f"gcloud compute tpus queued-resources describe {name} {place}",
        "DELETE": shell.quoted(delete(name, zone=zone, project=project)),
        "SSH": shell.quoted(ssh(name, zone=zone, project=project)),
        "STOP": shlex.quote(STOP),
        "GONE": "|".join(f'*"{words}"*' for words in GONE),
        "FAILED": f"{ExitCode.FAILED:d}",
        "PREEMPTED": f"{ExitCode.PREEMPTED:d}",
        "LOST": f"{CONNECTION_LOST:d}",
        "OVER": "|".join(f"{code:d}" for code in (ExitCode.DONE, *FINAL)),
    }
    return _filled(BODY, values)


def _collected(env: Mapping[str, str]) -> list[str]:
    """Returns lines that add the export of each variable on a host to `environment`.

    They change no variable of the script, whose tools run here. As in `shell.exports`, a secret is
    not written.
    """
    hidden, lines = shell.secrets(env), []
    for name, value in env.items():
        if name in hidden:
            lines.append(f'{shell.required(name)}; environment+="export {name}=${{{name}@Q}}; "')
        else:
            lines.append(f"environment+={shlex.quote(exported({name: value}))}")
    return lines


BODY = """\
#!/bin/bash
set -u
start=$$-$(date +%s)
environment="start=$start; "
@ENVIRONMENT@
say() { echo "$(date +%T) $*"; }
state() {  # of the request; GONE; or UNKNOWN, with the reason
  local errors
  { errors=$(@DESCRIBE@ --format='value(state.state)' 2>&1 >&3) && return; } 3>&1
  case "$errors" in
    @GONE@) echo GONE ;;
    *) echo "$errors" >&2; echo UNKNOWN ;;
  esac
}
create() { @CREATE@ || exit @FAILED@; }
remove() { @DELETE@; }
pause() { sleep "${LOCALGLOBAL_POLL:-30}" >/dev/null 2>&1 & wait $!; }

trap 'exit @PREEMPTED@' TERM  # while waiting: the request stays in the queue
asked=no seen= unknown=0
while :; do
  now=$(state)
  [ "$now" = "$seen" ] || say "machines @NAME@: ${now:-UNKNOWN}"
  seen=$now
  if [ "$now" = UNKNOWN ]; then unknown=$((unknown + 1)); else unknown=0; fi
  [ "$unknown" -lt 10 ] || exit @LOST@
  case "$asked:$now" in
    *:ACTIVE) break ;;
    no:GONE) create; asked=yes; continue ;;
    no:SUSPENDED|no:SUSPENDING|no:FAILED) remove || exit @FAILED@; continue ;;
    yes:FAILED) exit @FAILED@ ;;
    yes:SUSPENDED|yes:GONE|yes:DELETING) exit @PREEMPTED@ ;;
  esac
  pause
done

child=
on_hosts() {  # runs $1 on every host and sets `code`; connects again while the machines are there
  local tries=0 since
  while :; do
    since=$SECONDS
    @SSH@ --command="$environment$1" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends wait too early
    wait "$child"
    code=$?
    [ "$code" -eq 0 ] && return
    case "$(state)" in ACTIVE|UNKNOWN) ;; *) exit @PREEMPTED@ ;; esac  # the machines are gone
    case "$code" in 1|255) ;; *) return ;; esac
    [ $((SECONDS - since)) -lt 600 ] || tries=0
    tries=$((tries + 1))
    if [ "$tries" -ge 10 ]; then
      say "no connection to the hosts of @NAME@; a run that has started goes on there"
      exit @LOST@
    fi
    say "the connection ended with exit code $code: connecting again"
    pause
  done
}
stop() { @SSH@ --command="start=$start; "@STOP@; }
trap 'kill $child 2>/dev/null; exit @PREEMPTED@' TERM
on_hosts @PREPARE@
case "$code" in 0) ;; 2|3) exit @FAILED@ ;; *) exit "$code" ;; esac
trap stop TERM
on_hosts @REMOTE@
case "$code" in
  101|102|103) code=$((code - 100)) ;;
  2|3) exit @FAILED@ ;;  # of gcloud
esac
case "$code" in @OVER@) remove || say "the machines of @NAME@ could not be deleted" ;; esac
exit "$code"
"""
