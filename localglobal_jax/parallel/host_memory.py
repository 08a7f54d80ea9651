# SPDX-License-Identifier: Apache-2.0
"""Memory of the host: an early error for arrays that cannot fit, and trimming of the heap."""

import contextlib
import ctypes
import os
import pathlib

CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")  # of a container
GIB = 2**30


def total() -> int:
    """Bytes of memory of this machine, or of this container."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return machine


def check(what: str, size: int, remedy: str) -> None:
    """Raises ValueError if `size` bytes, what `what` need at the very least, are more than all."""
    if size > (there := total()):
        raise ValueError(
            f"{what}: {size / GIB:,.1f} GiB at least, and this machine has {there / GIB:,.1f}. "
            + remedy
        )


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library is glibc; elsewhere nothing happens.

    A save frees memory in the arenas of a dozen threads, and glibc keeps it there. (With two arenas
    for all threads less is kept, but training took 7 and 8 % longer, measured in two pairs.)
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
