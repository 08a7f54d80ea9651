# SPDX-License-Identifier: Apache-2.0
"""Barriers, broadcasts and coordinated shutdown of several hosts, one process per host.

Everything here names who is missing. JAX alone does not: a host that does not turn up ends the
others by SIGABRT after five minutes, and one that is slow lets them hang in a collective. `watch`
names a host that is lost.
"""

import collections
import contextlib
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from localglobal_jax.parallel import chips, private_names, watch

BARRIER = 600.0  # seconds; longer than any host may lag behind another between two steps
FIRST_WAITS = 0.5  # seconds of host 0 for the others to end before it
log = logging.getLogger(__name__)
_watches: list[watch.Watch] = []  # of the other hosts: one, if there are any
_broadcasts: collections.Counter[str] = collections.Counter()  # calls so far, by name


class HostLost(RuntimeError):
    """Another host is gone, or did not come (exit code 42: start all of them again)."""


def count() -> int:
    """Returns the number of processes of this program."""
    return jax.process_count()


def rank() -> int:
    """Returns the index of this process; rank 0 writes the files."""
    return jax.process_index()


def peak_flops() -> float | None:
    """Returns the peak bf16 FLOP/s of all devices of all hosts; None for an unknown device."""
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


def peak_bytes() -> int:
    """Returns the peak bytes in use of a device of this host; on CPU, of this process."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    found = max(each.get("peak_bytes_in_use", 0) for each in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def all_gather(rows: np.ndarray) -> np.ndarray:
    """Gathers the rows of all hosts. Every host must call it."""
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True)) if count() > 1 else rows


# --------------------------------------------------------------------------------- while running


def barrier(name: str, timeout: float = BARRIER) -> None:
    """Waits for all hosts; after `timeout` seconds raises HostLost with the absent ranks."""
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(f"localglobal_jax/{name}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = re.search(r"timed out task names:\s*(.*?)\n\s*\n", str(error), re.DOTALL)
        who = ", ".join(late[1].split()) if late else "another one"
        raise HostLost(
            f'host {rank()} waited {timeout:.0f} s at "{name}" for host {who}: look at its log'
        ) from None


def broadcast_text(name: str, text: str) -> str:
    """Returns the `text` of host 0 on every host; raises HostLost if none arrives in time.

    All hosts must make the same calls for a `name`: each call has a key of its own.
    """
    client = _client()
    if client is None:
        return text
    _broadcasts[name] += 1
    key = f"localglobal_jax/{name}/{_broadcasts[name]}"
    if rank() == 0:
        client.key_value_set(key, f"={text}", allow_overwrite=True)
    try:
        return client.blocking_key_value_get(key, int(BARRIER * 1000))[1:]
    except jax.errors.JaxRuntimeError:
        raise HostLost(f'host {rank()} waited {BARRIER:.0f} s at "{name}" for host 0') from None


def all_texts(name: str, text: str) -> list[str]:
    """Returns the `text` of every host, by rank; raises HostLost if one does not arrive in time.

    All hosts must make the same calls for a `name`, as of `broadcast_text`.
    """
    client = _client()
    if client is None:
        return [text]
    _broadcasts[name] += 1
    key = f"localglobal_jax/{name}/{_broadcasts[name]}"
    client.key_value_set(f"{key}/{rank()}", f"={text}", allow_overwrite=True)
    found = []
    for other in range(count()):
        try:
            there = client.blocking_key_value_get(f"{key}/{other}", int(BARRIER * 1000))
        except jax.errors.JaxRuntimeError:
            reason = f'host {rank()} waited {BARRIER:.0f} s at "{name}" for host {other}'
            raise HostLost(reason) from None
        found.append(there[1:])
    return found


def joined() -> bool:
    """Returns whether this process is one of several, without initializing devices."""
    return _client() is not None


def watched_by(watching: watch.Watch) -> None:
    """Keeps the watch over the other hosts for `naming_the_lost`, `finished` and `leave`."""
    _watches.append(watching)


def finished(code: int) -> None:
    """Tells the other hosts that this process is about to end with the exit code `code`."""
    for each in _watches:
        each.stop(code)


def _client() -> Any:
    return _state().client


def _state() -> Any:
    # jax has no public barrier with a timeout, and its public rank initializes the devices
    return private_names.find("jax._src.distributed.global_state")


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Context manager that turns the errors of collectives without a host into HostLost."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, OSError) as error:
        if count() > 1 and _of_collective(error):
            reason = str(error).splitlines()[0][:200]
            for each in _watches:  # a lost host ends this process here
                reason = each.reason(watch.heartbeat() + 10) or reason
            raise HostLost(
                f"host {rank()} lost another host ({reason}); start all hosts again: "
                "the run goes on from its last checkpoint"
            ) from error
        raise


def _of_collective(error: BaseException | None) -> bool:
    """Returns whether an error, or its cause, is of a collective whose other end is lost.

    The words of jax's errors may also be in a path or in an answer of a store. So a ValueError or
    an OSError must begin as XLA's do, with a status, and name the service in its own words.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            found = re.search(r"Gloo|gloo|NCCL|UNAVAILABLE|coordination|heartbeat", str(error))
        else:
            words = "Gloo|gloo|NCCL|coordination service|heartbeat timeout"
            found = re.match(f"[A-Z_]+: .*?({words})", str(error), re.DOTALL)
        if found:
            return True
        error = error.__cause__
    return False


def leave(code: int) -> NoReturn:
    """Ends this process; at its usual end jax would wait five minutes for the others, then abort.

    Not at once: the others may be about to say the same, and our end would be theirs.
    """
    finished(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        barrier("leaving", 5.0)  # less than the 6 s by which `watch` delays an abort of jax
        if _state().process_id == 0:  # jax aborts every host that outlives this one
            time.sleep(FIRST_WAITS)
    os._exit(code)


@contextlib.contextmanager
def stop_requests(seen: Callable[[], None] = lambda: None) -> Iterator[Callable[[int], bool]]:
    """Yields ``stop(step) -> bool``, which every host must call at every step.

    At the first request it calls `seen`, in the handler of the signal, and logs a line.

    A SIGTERM on any host, as schedulers send it before they take a machine away, makes it True on
    all hosts at the same step. On one host Ctrl-C does too, once; the second one
    interrupts as usual.
    """
    if count() > 1:  # jax has its own handler, and agrees on a step

        def reached(step: int) -> bool:
            if not multihost_utils.reached_preemption_sync_point(step):
                return False
            seen()
            log.warning("SIGTERM on a host: the state is saved, then the run ends")
            return True

        yield reached
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python allows handlers in the main thread only
        return
    event, asked_by = threading.Event(), list[int]()

    def ask(number: int, frame: Any) -> None:
        if not asked_by:
            seen()
        asked_by.append(number)
        event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    def tell() -> None:
        event.wait()
        if asked_by and asked_by[0] == signal.SIGINT:
            log.warning("Ctrl-C: the state is saved, then the run ends; Ctrl-C again ends it now")
        elif asked_by:
            log.warning("SIGTERM: the state is saved, then the run ends")

    # not in the handler, which may interrupt another line half written
    threading.Thread(target=tell, name="stop requests", daemon=True).start()
    previous: dict[int, Any] = {}
    for asked in (signal.SIGTERM, signal.SIGINT):
        previous[asked] = signal.signal(asked, ask)
    try:
        yield lambda step: bool(asked_by)
    finally:
        event.set()
        for number, handler in previous.items():
            signal.signal(number, handler)
