# SPDX-License-Identifier: Apache-2.0
"""Multi-host start-up: detects the cluster, connects its hosts, names those that are absent."""

import contextlib
import logging
import re
import socket
import time
from typing import NamedTuple

import jax

from localglobal_jax.parallel import multihost, private_names, watch
from localglobal_jax.parallel.multihost import HostLost

log = logging.getLogger(__name__)
NAME = 256  # bytes of a host's name, at most 253, and of what stands beside it
LATER = 40  # seconds after `watch.heartbeat` at which jax itself ends the other processes


class Cluster(NamedTuple):
    """The processes of a run: ``HOST:PORT`` of rank 0, their number, and this one's rank."""

    coordinator: str
    size: int
    rank: int
    local_devices: tuple[int, ...] | None = None  # None: all of this machine


def detect(timeout: float) -> Cluster:
    """Detects the cluster of Cloud TPU, Kubernetes, SLURM or Open MPI, else raises ValueError."""
    environment = private_names.find("jax._src.clusters.ClusterEnv")
    found = environment.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout)
    )
    coordinator, size, number, devices = found
    if coordinator is None or size is None or number is None:
        raise ValueError(
            "--distributed found no Cloud TPU, Kubernetes, SLURM or Open MPI environment: give "
            "--coordinator HOST:PORT --hosts N --host I on every host"
        )
    return Cluster(coordinator, size, number, None if devices is None else tuple(devices))


def start(cluster: Cluster, timeout: float = 300.0) -> None:
    """Joins the cluster; call it before anything touches a device.

    Raises ValueError for a cluster that cannot be, OSError for a port that is in use, HostLost, on
    every host, with the names of those that did not come within `timeout` seconds.
    """
    coordinator, size, number, devices = cluster
    port = int(coordinator.rpartition(":")[2]) if re.fullmatch(r"\S+:\d+", coordinator) else 0
    if not 0 < port < 2**16 or not 0 <= number < size:
        raise ValueError(
            f"--coordinator {coordinator} --hosts {size} --host {number}: want HOST:PORT, and "
            "0 <= host < hosts"
        )
    log.info("host     %d of %d (%s), coordinator %s; waiting for the others, at most %.0f s",
             number, size, socket.gethostname(), coordinator, timeout)  # fmt: skip
    heartbeat = watch.heartbeat()
    names, calls = _meet(cluster, timeout)
    multihost.watched_by(watch.Watch(number, names, calls))
    jax.distributed.initialize(
        coordinator,
        size,
        number,
        list(devices) if devices else None,
        initialization_timeout=int(timeout) + 60,  # all of them are there: this is quick
        heartbeat_timeout_seconds=int(heartbeat) + LATER,
    )
    log.info("host     %d of %d: all are here (%s), %d of %d devices", number, size,
             ", ".join(names), jax.local_device_count(), jax.device_count())  # fmt: skip


def rendezvous(cluster: Cluster, timeout: float) -> list[str]:
    """The host names by rank, once all have called rank 0; HostLost, with ranks, if they do not.

    On the coordinator's own port, which jax opens only afterwards.
    """
    names, calls = _meet(cluster, timeout)
    for call in calls.values():
        call.close()
    return names


Calls = dict[int, socket.socket]  # open connections to other hosts, by rank


def _meet(cluster: Cluster, timeout: float) -> tuple[list[str], Calls]:
    deadline = time.monotonic() + timeout
    return _call(cluster, deadline) if cluster.rank else _listen(cluster, deadline)


def _listen(cluster: Cluster, deadline: float) -> tuple[list[str], Calls]:
    port = int(cluster.coordinator.rpartition(":")[2])
    callers: dict[int, tuple[str, socket.socket]] = {}
    twice = ""
    try:
        server = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        # Not a ValueError, "wrong config": the port is free once an earlier process has ended.
        raise OSError(
            f"--coordinator {cluster.coordinator}: {error}: end the process that uses the port, or "
            "take another one (JAX_COORDINATOR_PORT with --distributed)"
        ) from None
    with server, contextlib.ExitStack() as open_calls:
        while len(callers) < cluster.size - 1 and not twice:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                call = open_calls.enter_context(server.accept()[0])
            except TimeoutError:
                break
            try:
                call.settimeout(2)
                text, name = _line(call, 2 * NAME).split()
                number = int(text)
            except (ValueError, OSError):
                call.close()  # not one of ours
                continue
            if number in callers or not 0 < number < cluster.size:
                twice = f"{name} says that it is host {number}, which is another one's number"
            else:
                callers[number] = name, call
        missing = [i for i in range(1, cluster.size) if i not in callers]
        names = [socket.gethostname(), *(callers[i][0] for i in sorted(callers))]
        if twice:
            answer = f"! {twice}\n"
        elif missing:
            answer = f"! {_absent(missing, cluster)}\n"
        else:
            answer = " ".join(names) + "\n"
        for _, call in callers.values():
            with contextlib.suppress(OSError):
                call.sendall(answer.encode())
        if answer.startswith("!"):
            raise HostLost(answer.removeprefix("!").strip())
        open_calls.pop_all()
    return names, {number: call for number, (_, call) in callers.items()}


def _call(cluster: Cluster, deadline: float) -> tuple[list[str], Calls]:
    (host, _, port), reason = cluster.coordinator.rpartition(":"), ""
    while True:
        left = deadline - time.monotonic()
        with contextlib.ExitStack() as kept:
            try:
                call = kept.enter_context(
                    socket.create_connection((host, int(port)), timeout=max(left, 0.01))
                )
                call.sendall(f"{cluster.rank} {socket.gethostname()}\n".encode())
                # rank 0 answers at its own deadline, which is later if it came later
                call.settimeout(max(left, 0.01) * 2 + 5)
                answer = _line(call, NAME * (cluster.size + 1))
            except OSError as error:
                answer, reason = "", f": {error.strerror or error}"
            if answer.startswith("!"):
                raise HostLost(answer.removeprefix("!").strip())
            if answer:
                kept.pop_all()
                return answer.split(), {0: call}
        if time.monotonic() >= deadline:
            raise HostLost(f"host 0 did not answer at {cluster.coordinator}{reason}")
        time.sleep(0.2)


def _line(call: socket.socket, most: int) -> str:
    """Returns one line of at most `most` bytes, and reads no byte after it.

    "" if the connection ends before, or if the line is longer.
    """
    text = b""
    while not text.endswith(b"\n"):
        if len(text) == most:
            return ""
        byte = call.recv(1)
        if not byte:
            return ""
        text += byte
    return text.decode(errors="replace").strip()


def _absent(missing: list[int], cluster: Cluster) -> str:
    ranks = ", ".join(map(str, missing))
    return f"host {ranks} of {cluster.size} did not turn up; start the command on every host"
