# SPDX-License-Identifier: Apache-2.0
"""Progress lines and the parameter table, for terminals and logs."""

import collections
import math
import shutil
import sys
from typing import Any, TextIO

import jax


def progress_line(
    step: int,
    total: int,
    *,
    loss: float | None,
    rate: float,
    items: str = "items",
    seconds: float,
    waiting: float,
    mfu: float | None = None,
) -> str:
    """Formats ``step 350/1000  loss 0.1234  5,234 items/s  ETA 1:05  input wait 3 %  MFU 41 %``.

    Args:
      rate: `items` per second.
      seconds: estimated time to the end.
      waiting: share of the time spent waiting for input, in [0, 1].
      mfu: model FLOPs utilization, in [0, 1]; None: not known.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if math.isfinite(rate):
        parts.append(f"{rate:,.0f} {items}/s" if rate >= 10 else f"{rate:.2g} {items}/s")
    if math.isfinite(seconds):
        minutes, left = divmod(round(seconds), 60)
        clock = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else f"{minutes}"
        parts.append(f"ETA {clock}:{left:02d}")
    if math.isfinite(waiting):
        parts.append(f"input wait {100 * waiting:.0f} %")
    if mfu is not None:
        parts.append(f"MFU {100 * mfu:.0f} %")
    return "  ".join(parts)


class Progress:
    """Writes progress: one line redrawn on a terminal, plain lines in a pipe."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._drawn = False

    def show(self, line: str) -> None:
        """Replaces the line on a terminal, adds a line in a pipe."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width] + "\x1b[K")
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def print(self, text: str) -> None:
        """Writes a permanent line above the redrawn one."""
        self._stream.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._stream.flush()
        self._drawn = False

    def close(self) -> None:
        """Ends the redrawn line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


def parameter_table(params: Any, most: int = 40) -> str:
    """Returns a table of path, shape and number of parameters, with the total, as text.

    More than `most` leaves are grouped by the first two names of their paths.
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    rows = [(path, str(shape), math.prod(shape)) for path, shape in leaves]
    if len(rows) > most:
        groups = collections.defaultdict(list)
        for path, _, count in rows:
            groups["/".join(path.split("/")[:2])].append(count)
        rows = [(path, f"{len(n)} arrays", sum(n)) for path, n in groups.items()]
    rows.append(("total", f"{len(leaves)} arrays", sum(math.prod(shape) for _, shape in leaves)))
    widths = [max(len(f"{row[i]:,}" if i == 2 else row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {n:>{widths[2]},}" for a, b, n in rows]
    return "\n".join([*lines[:-1], "-" * len(lines[-1]), lines[-1]])
