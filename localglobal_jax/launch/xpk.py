# SPDX-License-Identifier: Apache-2.0
"""TPUs in a Kubernetes cluster, by xpk: an argument list of ``xpk workload create`` for each run.

xpk pins old versions of common packages: give it an environment of its own and put it on the PATH.
Its ``--dry-run --output-manifest-file FILE`` turns what we print into the JobSet's manifest.
"""

from collections.abc import Mapping, Sequence

from localglobal_jax.launch import shell
from localglobal_jax.launch.local import PREEMPTED

GRACE = 120  # seconds from SIGTERM to SIGKILL


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
    """The argument list. A run that exits with 42 is restarted, up to `restarts` times."""
    return [
        *("xpk", "workload", "create"),
        f"--workload={name}",
        f"--cluster={cluster}",
        *([f"--project={project}"] if project else []),
        *([f"--zone={zone}"] if zone else []),
        f"--tpu-type={tpu_type}",
        f"--num-slices={slices}",
        f"--docker-image={image}",
        f"--priority={priority}",
        f"--max-restarts={restarts}",
        f"--restart-on-exit-codes={PREEMPTED}",
        f"--termination-grace-period-seconds={GRACE}",
        *(f"--env={key}={value}" for key, value in (env or {}).items()),
        f"--command={shell.quoted(command)}",
    ]
