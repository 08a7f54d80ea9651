# SPDX-License-Identifier: Apache-2.0
"""Writer (also to TensorBoard and wandb) and reader of the file ``metrics.jsonl``."""

import json
import logging
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from localglobal_jax.checkpoints.workdir import shown, write_atomically
from localglobal_jax.training.reporting import wandb as wandb_run

log = logging.getLogger(__name__)
ABOUT = ("log.tags", "log.note")  # fields that describe a run and change nothing in it


class Writer:
    """Appends to ``metrics.jsonl``, one JSON object a line, and to TensorBoard and wandb.

    A run that was killed has usually written lines past its last checkpoint, and computes those
    steps again. So opening drops every line after ``resume_step`` (all lines if it is None), and a
    torn last line. No (step, split) is written twice. `checksum` is stored in every checkpoint;
    passed as ``expected``, it detects lines that are missing or changed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        name: str = "",
        expected: int | None = None,
    ):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_step is None else resume_step
        self._written = _drop_after(self.path, last)
        self.checksum = checksum(workdir, last)
        if expected is not None and expected != self.checksum:
            log.error(
                "%s is not as it was at the save of step %d: lines are missing or have changed. "
                "The run continues without them; restore the file to recover them",
                *(shown(self.path), last),
            )
        self._file = self.path.open("a", encoding="utf-8")
        self._boards: list[Any] = []
        if tensorboard:
            # imported here: slow, and optional
            from localglobal_jax.training.reporting.tensorboard import EventFile  # noqa: PLC0415

            events = EventFile(self.path.parent / "tensorboard", forget=last + 1)
            if about := about_run(config or {}):
                events.show(max(last, 0), about)
            self._boards.append(events)
        if wandb:
            run = wandb_run.start(wandb, self.path.parent, config or {}, name)
            self._boards += [run] if run else []

    def write(self, step: int, split: str, given: Mapping[str, Any]) -> bool:
        """Adds one line; returns False, without writing, if the step and split exist already.

        JSON has no NaN and no infinity: they become the strings "nan", "inf", "-inf".
        """
        if (step, split) in self._written:
            return False
        self._written.add((step, split))
        values = {name: _number(value) for name, value in given.items()}
        line = {"step": int(step), "split": split} | values
        text = json.dumps(line, allow_nan=False) + "\n"
        self.checksum = zlib.crc32(text.encode(), self.checksum)
        self._file.write(text)
        numbers = {f"{split}/{k}": v for k, v in values.items() if not isinstance(v, str)}
        for board in self._boards:
            board.add(step, numbers)
        return True

    def show(self, step: int, shown: Mapping[str, str | np.ndarray]) -> None:
        """Adds texts and pictures (uint8 [h, w, 3]), by name, to TensorBoard and wandb."""
        for board in self._boards:
            board.show(step, shown)

    def flush(self) -> None:
        """Returns once everything is on the disk; called before a checkpoint is saved."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        """Flushes and closes. A full disk, which may be the reason for the call, is only logged."""
        for file in (self._file, *self._boards):
            try:
                file.close()
            except OSError as error:
                log.error("the last lines are not in %s: %s", shown(self.path.parent), error)


def about_run(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns ``log.tags`` and ``log.note`` of a config as texts by name, without empty ones."""
    given = config.get("log", {})
    texts = {"tags": ", ".join(given.get("tags") or ()), "note": given.get("note") or ""}
    return {name: text for name, text in texts.items() if text}


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """Returns the lines of ``metrics.jsonl`` that are JSON objects with a step and a split."""
    return [line for line in map(_parse, _texts(workdir)) if line]


def damaged_lines(workdir: str | os.PathLike) -> list[int]:
    """Returns the numbers, from 1, of the lines that `read_metrics` skips."""
    return [number for number, text in enumerate(_texts(workdir), 1) if not _parse(text)]


def _texts(workdir: str | os.PathLike) -> list[str]:
    path = epath.Path(workdir) / "metrics.jsonl"
    return path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else []


def _parse(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    known = isinstance(step, int) and 0 <= step < 2**63
    return line if known and isinstance(line.get("split"), str) else None


def _up_to(last: int, contents: bytes) -> dict[tuple[int, str], str]:
    """Returns the lines by step and split, without later, torn and duplicate lines."""
    kept = dict[tuple[int, str], str]()
    for text in contents.decode("utf-8", errors="replace").splitlines():
        line = _parse(text)
        if line and line["step"] <= last:
            kept.setdefault((line["step"], line["split"]), text)
    return kept


def _as_file(lines: dict[tuple[int, str], str]) -> bytes:
    return "".join(text + "\n" for text in lines.values()).encode()


def checksum(workdir: str | os.PathLike, last: int) -> int:
    """Returns the CRC-32 of the lines of ``metrics.jsonl`` up to step `last`."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return zlib.crc32(_as_file(_up_to(last, path.read_bytes())) if path.exists() else b"")


def _drop_after(path: pathlib.Path, last: int) -> set[tuple[int, str]]:
    """Rewrites the file, if needed, without later, torn and duplicate lines; returns its keys."""
    if not path.exists():
        return set()
    before = path.read_bytes()
    kept = _up_to(last, before)
    after = _as_file(kept)
    if after != before:
        dropped = len(before.splitlines()) - len(kept)
        said = "%s: dropping %d lines after step %d, to be computed again"
        log.info(said, shown(path), dropped, last)
        write_atomically(path, after)
    return set(kept)


def _number(value: Any) -> int | float | str:
    if isinstance(value, (bool, int, np.integer)):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else str(value)
