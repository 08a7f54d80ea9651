# SPDX-License-Identifier: Apache-2.0
"""Finds the reason of a failure in the log of a process."""

import errno
import os
import pathlib
import re
import signal
from collections.abc import Sequence

LONGEST = 320  # characters of a reason
TAIL = 2**18  # bytes at the end of a log that are searched
# A line of our command line, such as "localglobal train: no such data".
OURS = re.compile(r"localglobal(?: [a-z]+)?: (?=\S)")
TRACEBACK = re.compile(r"[\s+|]*(?:Exception Group )?Traceback \(most recent call last\):")
# The line before a traceback of an error that does not end the process.
IGNORED = re.compile(
    r"Exception ignored |Exception in thread |--- Logging error ---|Exception in callback "
    r"|Task exception was never retrieved|Future exception was never retrieved|Error in atexit"
)
# The first line that does not belong to an exception's message any more.
END = re.compile(
    r"-{8,}$|For simplicity, JAX has removed|The above exception was|During handling of the above"
    r"|\s*(?:BufferAssignment|Largest program allocations)"
)
# Messages with which native code ends a process; group 1 is shown.
NATIVE = (
    re.compile(r"F\d{4} [\d:.]+\s+\d+ \S+\] (.+)"),  # of a failed check of XLA
    re.compile(r"F\d{8} [\d:.]+\s+\d+ \S+\] (.+)"),
    re.compile(r"(?:\s*what\(\):\s+)(.+)"),
    re.compile(r"(LLVM ERROR: .+)"),
    re.compile(r"terminate called after throwing an instance of '(.+)'"),
    re.compile(r"((?:malloc|free|realloc|munmap_chunk|corrupted).*\(\): .+|double free.+)"),
    re.compile(r"Fatal Python error: (.+)"),
)
MEMORY = re.compile(
    r"bad_alloc|MemoryError|RESOURCE_EXHAUSTED|[Cc]annot allocate memory|OUT_OF_MEMORY"
    r"|[Oo]ut of memory|failed to map segment"
)


def reason(text: str) -> str:
    """Returns the reason of a failure in one line, of at most `LONGEST` characters; "" if none.

    `text`: the log of one attempt. The reason is the message of the last exception, without JAX's
    note about its frames, the last error line of `localglobal`, or the message of native code.
    """
    lines = text.splitlines()
    at = max(_exceptions(lines), default=None)
    if at is not None:
        found = OURS.sub("", _message(lines[at:]), count=1)
    else:
        found = next(filter(None, (_native(lines, known) for known in NATIVE)), "")
    if MEMORY.search(found) and "out of memory: " not in found:
        found = f"out of memory: {found}"
    return found if len(found) <= LONGEST else f"{found[: LONGEST - 3].rstrip()}..."


def _native(lines: Sequence[str], known: re.Pattern[str]) -> str:
    """Returns the first message of that kind: later ones are its consequences."""
    return next((match[1].strip() for line in lines if (match := known.match(line))), "")


def _exceptions(lines: Sequence[str]) -> list[int]:
    """Returns the numbers of the lines in which an exception, or an error of ours, begins."""
    found, aside = list[int](), list[int]()
    ignored, i = False, 0
    while i < len(lines):
        if OURS.match(lines[i]):
            found.append(i)
        elif IGNORED.match(lines[i]):
            ignored = True
        elif TRACEBACK.match(lines[i]):
            depth = _depth(lines[i])
            i += 1
            while i < len(lines) and _is_frame(lines[i], depth):
                i += 1
            if i < len(lines):
                (aside if ignored else found).append(i)
            ignored = False
        i += 1
    return found or aside


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" +|"))


def _is_frame(line: str, depth: int) -> bool:
    """Returns whether a line after a traceback's first belongs to a frame."""
    return not line.strip(" |") or _depth(line) > depth


def _message(lines: Sequence[str]) -> str:
    """Returns the message that begins in the first line, its lines joined, up to `LONGEST`."""
    kept: list[str] = []
    for line in lines:
        beyond = kept and (END.match(line) or OURS.match(line) or TRACEBACK.match(line))
        if beyond or (kept and not line.strip()) or sum(map(len, kept)) > LONGEST:
            break
        kept.append(line.strip(" +|"))
    return " ".join(" ".join(kept).split())


def of_attempt(log: pathlib.Path, code: int, start: int = 0, kills: int = 0) -> str:
    """Returns the reason of an attempt that ended with `code`, in one line; "" if there is none.

    Args:
      log: its log; the attempt has written it from byte `start` on.
      code: the exit code, negative for a signal, as in `subprocess`.
      kills: the processes that the kernel has ended for lack of memory meanwhile.
    """
    text = ""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start if start <= end else 0, end - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            return f"{log} cannot be read: {error.strerror}"
    found = of_signal(code, kills) or reason(text) or _full(log.parent)
    if found or not 0 < code < 128:
        return found
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if line and not END.match(line)), "")[:LONGEST]


def _full(folder: pathlib.Path) -> str:
    try:
        space = os.statvfs(folder)
    except OSError:
        return ""
    full = space.f_blocks > 0 and space.f_bavail * space.f_frsize < 2**16
    return f"{os.strerror(errno.ENOSPC)}: {folder}" if full else ""


def memory_kills() -> int:
    """Returns how many processes this machine's kernel has ended for lack of memory, since boot."""
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            found = re.search(r"^oom_kill (\d+)", pathlib.Path(file).read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


def of_signal(code: int, kills: int) -> str:
    """Returns the reason of a process that SIGKILL has ended; "" for other exit codes.

    `code`: negative for a signal, as in `subprocess`. `kills`: the processes that the kernel has
    ended for lack of memory meanwhile.
    """
    if code not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return ""
    if kills > 0:
        return "out of memory: the kernel has ended it, or another process, for lack of memory"
    return "ended from outside, or for lack of memory (the kernel's log, `dmesg`, has that)"
