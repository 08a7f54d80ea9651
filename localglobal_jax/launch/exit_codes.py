# SPDX-License-Identifier: Apache-2.0
"""Exit codes of the command line and of a run, and how the launcher reacts to each."""

import enum
import signal


class ExitCode(enum.IntEnum):
    """Exit code of a `localglobal` process."""

    DONE = 0
    FAILED = 1  # any other error
    WRONG = 2  # wrong config or input; argparse uses the same code
    DIVERGED = 3
    PREEMPTED = 42  # state saved: the same command resumes
    INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C, as shells count


FINAL = (ExitCode.WRONG, ExitCode.DIVERGED)  # the same command would fail in the same way
REASONS = {
    ExitCode.WRONG: "wrong config or input",
    ExitCode.DIVERGED: "diverged",
    ExitCode.PREEMPTED: "stopped",
}


def what_next(code: int, crashes: int, retries: int) -> str:
    """Returns "done", "restart" (state saved), "retry" (crashed) or "failed".

    `code` is negative for a signal, as in `subprocess`. `crashes` includes this one.
    """
    if code == ExitCode.DONE:
        return "done"
    if code == ExitCode.PREEMPTED:
        return "restart"
    return "retry" if code not in FINAL and crashes <= retries else "failed"


def explained(code: int) -> str:
    """Describes an exit code, or the signal that ended a process, in words."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:  # a signal of real time
            return f"killed by signal {-code}"
    reason = next((text for known, text in REASONS.items() if known == code), "")
    return f"exit code {code:d}" + (f" ({reason})" if reason else "")
