# SPDX-License-Identifier: Apache-2.0
"""Exit codes of a run, and what a scheduler does about each."""

import signal

from localglobal_jax.launch.local import DIVERGED, DONE, PREEMPTED, WRONG

REASONS = {WRONG: "wrong config or input", DIVERGED: "diverged", PREEMPTED: "stopped and saved"}


def what_next(code: int, crashes: int, retries: int) -> str:
    """What follows when a process ended: done, restart (it saved), retry (it crashed) or failed.

    `code`: negative for a signal, as in `subprocess`; `crashes`: how often, this one included.
    """
    if code == DONE:
        return "done"
    if code == PREEMPTED:
        return "restart"
    return "retry" if code not in (WRONG, DIVERGED) and crashes <= retries else "failed"


def explained(code: int) -> str:
    """For people."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" + (f" ({REASONS[code]})" if code in REASONS else "")
