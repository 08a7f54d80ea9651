# SPDX-License-Identifier: Apache-2.0
"""SLURM: one ``sbatch`` array script for a whole sweep, a task of the array for each run.

Two minutes before its time is over (or when it is preempted) the batch shell gets SIGTERM and
passes it to all processes of the run; these save and exit with 42, and the task is put back into
the queue. Any other exit code ends it, so a wrong config does not come back for ever.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from localglobal_jax.launch import shell
from localglobal_jax.launch.expand import Description
from localglobal_jax.launch.pool import ATTEMPTS

GRACE = 120  # seconds between the signal and the end; a step and a checkpoint have to fit


def tasks_per_node(gpus: int) -> int:
    """Processes of one run on a node: JAX on SLURM takes one GPU for each, where it detects it."""
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
    """The script. `commands`: of each name; `options`: further ones of sbatch, ``--time=1:00:00``.

    A run with several processes is told so by ``--distributed``, which must be in its command.
    """
    tasks = tasks_per_node(gpus)
    most = f"%{concurrent}" if concurrent else ""
    lines = [
        f"--job-name={prefix}",
        f"--array={_ranges([run.index for run in runs])}{most}",
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
        f"  {run.index}) directory={shlex.quote(run.workdir)}\n"
        f"     command=({shell.quoted(commands[run.name])}) ;;"
        for run in runs
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
            '  *) echo "no run ${SLURM_ARRAY_TASK_ID}" >&2; exit 2 ;;',
            "esac",
            BODY.replace("ATTEMPTS", ATTEMPTS),
        ]
    )


BODY = """\
record() { echo "{$1, \\"time\\": $(date +%s)}" >> "$directory/ATTEMPTS"; }
mkdir -p "$directory"
record '"event": "start"'
# srun takes all from sbatch but this.
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}
srun $cpus --kill-on-bad-exit=1 --output="$directory/log.txt" --open-mode=append "${command[@]}" &
child=$!
# To the processes of the run, not to srun, which would end them after a few seconds.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends wait too early
wait "$child"
code=$?
record "\\"event\\": \\"end\\", \\"code\\": $code"
if [ "$code" -eq 42 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 1000 ]; then
  sleep 10  # a cluster that is not well is not asked every second
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
