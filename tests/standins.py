# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for `gcloud`, SLURM and `xpk`, which cannot be had in a test.

They run the shell code that they are given in a real bash, once per host. A host has an empty
environment but for its own words (`host_words`), and a home directory of its own.
"""

import os
import pathlib
import sys

# As gcloud 528 does: a host whose connection is lost (255) is tried again; the exit code is that of
# the first host that failed; a request that does not exist is NOT_FOUND.
GCLOUD = r"""
echo "$*" >> "$PLACE/calls"
ssh() {  # host, shell code
  mapfile -d '' -t words < "$PLACE/host$1/words"
  local i
  for i in 1 2 3 4 5 6 7 8 9 10; do
    setsid "${words[@]}" bash -c "$2" < /dev/null &
    echo $! > "$PLACE/host$1/ssh"
    wait $!
    local code=$?
    [ -e "$PLACE/host$1/cut" ] || return $code  # the test has ended the connection
    rm "$PLACE/host$1/cut"
    echo "Retrying: SSH command error: exited with return code [255]." >&2
    sleep 0.2
  done
  return 255
}
case "$4" in
  describe)
    [ -e "$PLACE/state" ] && exec cat "$PLACE/state"
    echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: not found" >&2
    exit 1 ;;
  create) cat "$PLACE/state.new" > "$PLACE/state" 2>/dev/null || echo ACTIVE > "$PLACE/state" ;;
  delete) rm "$PLACE/state" ;;
  ssh)
    for word; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
    pids=()
    for words in "$PLACE"/host*/words; do
      host=${words%/words}; host=${host##*host}
      if [ -e "$PLACE/trace" ]; then
        (set -o pipefail; ssh "$host" "$command" 2>&1 | sed "s/^/host $host: /") &
      else ssh "$host" "$command" & fi
      pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do
      wait "$pid"; one=$?
      [ "$code" -ne 0 ] || code=$one
    done
    exit "$code" ;;
esac
"""


def tool(folder: pathlib.Path, name: str, body: str) -> None:
    """Writes the executable bash script `name`."""
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def host(place: pathlib.Path, index: int, path: str, prefix: tuple[str, ...] = (), **env: str):
    """Makes host `index` in `place` and returns its home. `prefix`: words before ``env -i``."""
    home = place / f"host{index}"
    home.mkdir(parents=True)
    (home / "prefix").write_text(" ".join(prefix))
    pairs = {"HOME": str(home), "PATH": path, **env}
    words = [*prefix, "env", "-i", f"--chdir={home}", *(f"{k}={v}" for k, v in pairs.items())]
    (home / "words").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    return home


# ---------------------------------------------------------------------------------------- SLURM

# A queue of one job at a time. Tasks of arrays run in the background, as after a real sbatch; one
# that is requeued runs again. As SLURM does, a task gets the environment of its submission.
SBATCH = r"""
script=${!#}
number=$(($(cat "$PLACE/jobs" 2>/dev/null || echo 7000) + 1))
echo "$number" > "$PLACE/jobs"
cp "$script" "$PLACE/job-$number"
option() { sed -n "s/^#SBATCH --$1=//p" "$PLACE/job-$number" | tail -n 1; }
last=$(option array); last=${last%%%*}; last=${last#*-}
export SLURM_JOB_NUM_NODES=$(option nodes) SLURM_CPUS_PER_TASK=$(option cpus-per-task)
[ -n "$SLURM_CPUS_PER_TASK" ] || unset SLURM_CPUS_PER_TASK
cd "$(option chdir)"
(
  for task in $(seq 0 "$last"); do
    output=$(option output | sed "s/%A/$number/; s/%a/$task/")
    export SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$((number * 10 + task)) SLURM_RESTART_COUNT=0
    while :; do
      rm -f "$PLACE/requeue-$SLURM_JOB_ID"
      bash "$PLACE/job-$number" >> "$output" 2>&1 &
      echo $! > "$PLACE/batch"
      wait $!
      echo "task $task of job $number: exit code $?" >> "$PLACE/ended"
      [ -e "$PLACE/requeue-$SLURM_JOB_ID" ] || break
      SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
    done
  done
  touch "$PLACE/idle"
) < /dev/null > /dev/null 2>&1 &
echo "$number"
"""
SCONTROL = r"""
case "$1" in
  requeue) touch "$PLACE/requeue-$2" ;;
  show) echo "MaxArraySize            = 1001" ;;
esac
"""
SCANCEL = r"""for pid in "$PLACE"/task*.pid; do kill -TERM "$(cat "$pid")"; done"""
# With --kill-on-bad-exit the others get SIGTERM, and SIGKILL 30 s later; the highest code counts.
SRUN = r"""
import os, pathlib, signal, subprocess, sys, time
place, words, options = pathlib.Path(os.environ["PLACE"]), sys.argv[1:], {}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
count = int(os.environ["SLURM_JOB_NUM_NODES"])
nodes = (place / "nodes").read_text().split()
output = open(options["--output"], "a")
tasks = []
for i in range(count):
    prefix = (place / f"host{i}" / "prefix").read_text().split()
    env = {**os.environ, "HOME": str(place / f"host{i}"), "SLURM_PROCID": str(i),
           "SLURM_LOCALID": "0", "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_NODES": str(count),
           "SLURM_STEP_NODELIST": ",".join(nodes[:count])}
    tasks.append(subprocess.Popen([*prefix, *words], env=env, stdout=output, stderr=output))
    (place / f"task{i}.pid").write_text(str(tasks[i].pid))
until = None
while any(task.poll() is None for task in tasks):
    if until is None and any(task.poll() for task in tasks):
        until = time.monotonic() + 30
        for task in tasks:
            if task.poll() is None:
                task.terminate()
    if until and time.monotonic() > until:
        for task in tasks:
            task.kill()
    time.sleep(0.05)
sys.exit(max(128 - c if c < 0 else c for c in (task.returncode for task in tasks)))
"""


# ------------------------------------------------------------------------------------------ xpk

# The command of the container in the JobSet that xpk 1.16 makes (`--output-manifest-file`).
CONTAINER = r"""
echo XPK Start: $(date);
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
(@COMMAND@) & PID=$!;
while kill -0 $PID 2>/dev/null;
    do sleep 5;
done;
wait $PID;
EXIT_CODE=$?;
echo XPK End: $(date);
echo EXIT_CODE=$EXIT_CODE;
exit $EXIT_CODE
"""
# The JobSet's policy: a pod that ends with one of the codes restarts all pods, any other code is
# final. xpk adds 127 to 255 to the codes that it is given.
XPK = r"""
import json, os, pathlib, subprocess, sys, time
place, container = pathlib.Path(os.environ["PLACE"]), os.environ["CONTAINER"]
given, env = {}, {}
for word in sys.argv[3:]:
    name, _, value = word.partition("=")
    if name == "--env":
        key, _, text = value.partition("=")
        env[key] = text
    else:
        given[name] = value
job = place / given["--workload"]
if job.exists():
    sys.exit(f"jobset {job.name} already exists")
job.mkdir()
if os.fork():
    sys.exit(0)
os.setsid()
for stream in range(3):  # the caller reads until all have closed them
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
code = container.replace("@COMMAND@", given["--command"])
again = {int(c) for c in given["--restart-on-exit-codes"].split(",")} | set(range(127, 256))
for attempt in range(int(given["--max-restarts"]) + 1):
    pods = []
    for file in sorted(place.glob("host*/words")):
        words = [os.fsdecode(w) for w in file.read_bytes().split(b"\0")[:-1]]
        log = open(job / f"{file.parent.name}.txt", "a")
        words += [f"{key}={value}" for key, value in env.items()]
        pods.append(subprocess.Popen([*words, "bash", "-c", code], stdout=log, stderr=log,
                                     stdin=subprocess.DEVNULL))
        (file.parent / "pod").write_text(str(pods[-1].pid))
    codes = [pod.poll() for pod in pods]
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [pod.poll() for pod in pods]
    failed = [code for code in codes if code]
    for pod in pods:  # the others of a failed job are deleted
        if pod.poll() is None:
            pod.terminate()
    until = time.monotonic() + int(given["--termination-grace-period-seconds"])
    for pod in pods:
        try:
            pod.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pod.kill()
    with open(job / "attempts", "a") as out:
        out.write(f"{[pod.wait() for pod in pods]}\n")
    if not failed or not again.issuperset(failed):
        break
(job / "ended").touch()
"""


def program(folder: pathlib.Path, name: str, body: str) -> None:
    """Writes the executable Python program `name`."""
    (folder / name).write_text(f"#!{sys.executable}\n{body}")
    (folder / name).chmod(0o755)
