# SPDX-License-Identifier: Apache-2.0
"""Runs the command line: ``python -m localglobal_jax`` is the same as ``localglobal``.

Ctrl-C gives the exit code 130 at any moment, without a traceback. Nothing is imported here before
the handler of the signal is set.
"""

import contextlib
import gc
import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT  # as shells count
_interrupted = False


def console() -> int:
    """Runs the command line as the console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background
        signal.signal(signal.SIGINT, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see `_use_large_pages`
    _use_large_pages()
    # Imports and traces make objects that live. Python searched them 400 times before the first
    # step of digits, which took a tenth of that time; now 20 times.
    gc.set_threshold(10_000, 20)
    from localglobal_jax.cli import main  # noqa: PLC0415

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    try:
        code = main.console()
    except BaseException:
        if _interrupted:  # other code may have turned it into another exception
            _leave()
        raise
    if code == INTERRUPTED or (_interrupted and code):
        _leave()
    return code


def _use_large_pages() -> None:
    """Starts the process again, with large pages for its large allocations.

    On CPU, XLA allocates its temporary memory again at every step. With pages of 4 KiB, page faults
    took half of the CPU time of a training step here (345 images/s against 563 with large pages),
    and glibc reads this setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # a Ctrl-C waits until the new process has its handler
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # nosec B606 # this program


def _leave(*_: Any) -> NoReturn:
    """Ends the process at once.

    Python's own end would wait for threads, and XLA's threads that still compile would crash it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            stream.flush()  # not a closed pipe, nor no stream at all
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: Any) -> None:
    global _interrupted  # noqa: PLW0603
    _interrupted = True
    signal.default_int_handler(number, frame)


def _unraisable(found: Any) -> None:
    """Ends the process for a Ctrl-C in a callback that cannot raise, such as one of gc."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(found)


if __name__ == "__main__":
    sys.exit(console())
