# SPDX-License-Identifier: Apache-2.0
"""Many hosts, a process each: find each other, wait for each other, stop together.

Everything here names who is missing. JAX alone does not: a host that does not turn up ends the
others by SIGABRT after five minutes, and one that is slow or lost lets them hang in a collective.
"""

import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed  # jax has no public barrier with a timeout,
from jax._src.clusters import ClusterEnv  # and no other way to ask without starting
from jax.experimental import multihost_utils

from localglobal_jax.parallel import chips

BARRIER = 600.0  # seconds; longer than any host may lag behind another between two steps
HEARTBEAT = 60  # seconds without a sign of life after which a host is taken for lost
log = logging.getLogger(__name__)


class Lost(RuntimeError):
    """Another host is gone, or did not come (exit code 42: start all of them again)."""


class Cluster(NamedTuple):
    """Who takes part: ``HOST:PORT`` of rank 0, how many, which of them this is."""

    coordinator: str
    size: int
    rank: int
    local_devices: tuple[int, ...] | None = None  # None: all of this machine


def count() -> int:
    """How many processes run this program."""
    return jax.process_count()


def rank() -> int:
    """Which of them this is; 0 writes the files."""
    return jax.process_index()


def peak_flops() -> float | None:
    """FLOP/s in bf16 of all devices of all hosts together; None where it is not known."""
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


def peak_bytes() -> int:
    """The most memory that a device of this host ever held; on CPU, that this process did."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    found = max(each.get("peak_bytes_in_use", 0) for each in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gathered(rows: np.ndarray) -> np.ndarray:
    """The rows of all hosts; all have to call it."""
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True)) if count() > 1 else rows


# ---------------------------------------------------------------------------------------- start


def detect(timeout: float) -> Cluster:
    """What Cloud TPU, Kubernetes, SLURM or Open MPI say; ValueError if none of them does."""
    found = ClusterEnv.auto_detect_unset_distributed_params(
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

    Raises ValueError for a cluster that cannot be, Lost, on every host, with the names of those
    that did not come within `timeout` seconds.
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
    names = roll_call(cluster, timeout)
    jax.distributed.initialize(
        coordinator,
        size,
        number,
        list(devices) if devices else None,
        initialization_timeout=int(timeout) + 60,  # all of them are there: this is quick
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    log.info("host     %d of %d: all are here (%s), %d of %d devices", number, size,
             ", ".join(names), jax.local_device_count(), jax.device_count())  # fmt: skip


def roll_call(cluster: Cluster, timeout: float) -> list[str]:
    """The host names by rank, once all have called rank 0; Lost, naming ranks, if they do not.

    On the coordinator's own port, which jax opens only afterwards.
    """
    deadline = time.monotonic() + timeout
    return _call(cluster, deadline) if cluster.rank else _listen(cluster, deadline)


def _listen(cluster: Cluster, deadline: float) -> list[str]:
    port = int(cluster.coordinator.rpartition(":")[2])
    callers: dict[int, tuple[str, socket.socket]] = {}
    twice = ""
    try:
        server = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        raise ValueError(
            f"--coordinator {cluster.coordinator}: {error}; take another port"
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
                text, name = call.makefile().readline(1000).split()
                number = int(text)
            except (ValueError, OSError):
                continue  # not one of ours
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
        raise Lost(answer.removeprefix("!").strip())
    return names


def _call(cluster: Cluster, deadline: float) -> list[str]:
    host, _, port = cluster.coordinator.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, int(port)), timeout=max(left, 0.01)) as call:
                call.sendall(f"{cluster.rank} {socket.gethostname()}\n".encode())
                # rank 0 answers at its own deadline, which is later if it came later
                call.settimeout(max(left, 0.01) * 2 + 5)
                answer = call.makefile().readline().strip()
        except OSError:
            answer = ""
        if answer.startswith("!"):
            raise Lost(answer.removeprefix("!").strip())
        if answer:
            return answer.split()
        if time.monotonic() >= deadline:
            raise Lost(f"host 0 did not answer at {cluster.coordinator}")
        time.sleep(0.2)


def _absent(missing: list[int], cluster: Cluster) -> str:
    ranks = ", ".join(map(str, missing))
    return f"host {ranks} of {cluster.size} did not turn up; start the command on every host"


# --------------------------------------------------------------------------------- while running


def barrier(name: str, timeout: float = BARRIER) -> None:
    """Until all hosts are here; after `timeout` seconds raises Lost with the ranks that are not."""
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(f"localglobal_jax/{name}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = re.search(r"timed out task names:\s*(.*?)\n\s*\n", str(error), re.DOTALL)
        who = ", ".join(late[1].split()) if late else "another one"
        raise Lost(
            f'host {rank()} waited {timeout:.0f} s at "{name}" for host {who}: look at its log'
        ) from None


def told(name: str, text: str) -> str:
    """The `text` of host 0, on every host; raises Lost if it says nothing."""
    client = _client()
    if client is None:
        return text
    key = f"localglobal_jax/{name}"
    if rank() == 0:
        client.key_value_set(key, f"={text}", allow_overwrite=True)
    try:
        return client.blocking_key_value_get(key, int(BARRIER * 1000))[1:]
    except jax.errors.JaxRuntimeError:
        raise Lost(f'host {rank()} waited {BARRIER:.0f} s at "{name}" for host 0') from None


def joined() -> bool:
    """Is this process one of several? Asks no device."""
    return _client() is not None


def _client() -> Any:
    return distributed.global_state.client


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turns what a collective raises after the death of another host into Lost."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, OSError) as error:
        if count() > 1 and re.search(
            r"Gloo|gloo|NCCL|UNAVAILABLE|coordination|heartbeat", str(error)
        ):
            reason = str(error).splitlines()[0][:200]
            raise Lost(
                f"host {rank()} lost another host ({reason}); start all hosts again: "
                "the run goes on from its last checkpoint"
            ) from error
        raise


def leave(code: int) -> NoReturn:
    """Ends this process; at its usual end jax would wait five minutes for the others, then abort.

    Not at once: the others may be about to say the same, and our end would be theirs.
    """
    with contextlib.suppress(Exception):
        barrier("leaving", 10.0)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """A function of the step, which all hosts have to ask at every step: shall we stop now?

    SIGTERM asks for it, as schedulers send it before they take a machine away; on any host, and
    then all of them stop at the same step. On one host Ctrl-C does too, once; the second one
    interrupts as usual.
    """
    if count() > 1:  # jax has its own handler, and agrees on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: event.is_set()  # Python allows handlers in the main thread only
        return

    def ask(number: int, frame: Any) -> None:
        event.set()
        if number == signal.SIGINT:
            log.warning("saving after this step; Ctrl-C again to stop at once")
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous: dict[int, Any] = {}
    for asked in (signal.SIGTERM, signal.SIGINT):
        previous[asked] = signal.signal(asked, ask)
    try:
        yield lambda step: event.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
