# SPDX-License-Identifier: Apache-2.0
"""Reads the state of a sweep from its workdirs, at any time, also while it runs."""

import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.checkpoints import gcs, objects, steps, workdir
from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.config import schema
from localglobal_jax.launch import exit_codes, pool
from localglobal_jax.launch.expand import Description
from localglobal_jax.training import early_stopping
from localglobal_jax.training.reporting import metrics_log

SILENT = 600  # seconds without a line after which a run no longer counts as running
STATES = ("done", "running", "preempted", "failed", "unfinished", "not started", "other config")
SHOWN = 4  # metrics of a split in the table; the CSV has all


def read(run: Description, now: float | None = None) -> dict[str, Any]:
    """Returns the state, step, last metrics by split and age of the last line of a run."""
    directory = gcs.LocalMirror(run.workdir).local
    lines = metrics_log.read_metrics(directory)
    metrics: dict[str, dict[str, Any]] = {}
    for line in lines:
        metrics[line["split"]] = {k: v for k, v in line.items() if k != "split"}
    saved = latest_step(run.workdir)
    events = _events(directory / pool.ATTEMPTS)
    last = events[-1] if events else {}
    marks = [float(last["time"])] if "time" in last else []
    if (directory / "metrics.jsonl").exists():
        marks.append(objects.modified(workdir.absolute(run.workdir), "metrics.jsonl"))
    age = max(0.0, (time.time() if now is None else now) - max(marks)) if marks else None
    # A lock on a remote store cannot be seen from here; the run writes there only when it saves.
    locked = None if is_remote(run.workdir) else pool.is_locked(pathlib.Path(run.workdir))
    steps = steps_of(run.run, run.workdir, saved)
    state, note = _state(run, saved, last, age, locked, steps=steps)
    if not (directory / "config.json").exists() and not events:
        state, note = "not started", ""
    elif changed := _changed(run, directory / "config.json"):
        state, note = "other config", changed  # its numbers belong to another sweep
    return {
        "index": run.index,
        "name": run.name,
        "state": state,
        "note": note,
        "step": max([saved or 0, *(line["step"] for line in lines)]),
        "steps": steps,
        "saved": saved,
        "age": age,
        "attempts": sum(event.get("event") == "start" for event in events),
        "overrides": dict(run.overrides),
        "metrics": metrics,
        "workdir": run.workdir,
    }


def _changed(run: Description, file: pathlib.Path) -> str:
    """Returns the first field that differs from this sweep's; "" if none, or if unreadable."""
    try:
        lines = workdir.other_config(run.run, file).splitlines() if file.exists() else []
    except ValueError:  # damaged: starting the run reports it
        return ""
    return lines[0].strip() if lines else ""


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Returns the newest step whose checkpoint is complete (has a manifest); None without one."""
    found = steps.scan(workdir.absolute(directory) / "checkpoints")
    return max((step for step, complete in found.items() if complete), default=None)


def steps_of(run: schema.Run, directory: str | os.PathLike[str], saved: int | None) -> int:
    """Returns the steps of a run: `saved`, its newest checkpoint, if it stopped early there.

    See `training.early_stopping`. A checkpoint that cannot be read counts as one of a run that goes
    on.
    """
    if not run.eval.patience or saved is None or saved >= run.steps:
        return run.steps
    name = "metadata/metadata"
    folder = workdir.absolute(directory) / "checkpoints" / str(saved)
    try:
        metadata = json.loads(dict(objects.contents(folder, {name: 0}))[name])["metadata"]
        return saved if early_stopping.has_stopped(run, metadata) else run.steps
    except (OSError, ValueError, KeyError, TypeError):
        return run.steps


def _state(
    run: Description,
    saved: int | None,
    last: Mapping[str, Any],
    age: float | None,
    locked: bool | None,
    *,
    steps: int,
) -> tuple[str, str]:
    """Returns the state and a note, which may be empty."""
    since = f"last line {duration(age)} ago" if age is not None else ""
    if locked:
        return "running", since
    if saved is not None and saved >= steps:
        return "done", "" if steps == run.run.steps else f"stopped early of {run.run.steps:,}"
    if locked is None:
        return "unfinished", since
    if last.get("event") == "end":
        code = int(last.get("code", 1))
        if code == exit_codes.ExitCode.PREEMPTED:
            return "preempted", exit_codes.explained(code)
        return "failed", f"{exit_codes.explained(code)}; see {run.workdir}/{pool.LOG}"
    if age is not None and age < SILENT:
        return "running", since
    return "preempted", f"silent: {since}" if since else "silent"


def _events(file: pathlib.Path) -> list[dict[str, Any]]:
    found = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn
        if isinstance(line, dict):
            found.append(line)
    return found


def duration(seconds: float | None) -> str:
    """Returns a duration as ``12 s``, ``3:20 min``, ``2:05 h`` or ``3 d``."""
    total = round(seconds or 0)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02d} min"
    return f"{total // 3600}:{total % 3600 // 60:02d} h" if total < 86400 else f"{total // 86400} d"


# ---------------------------------------------------------------------------- output


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line per run, and the number of runs in each state."""
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        steps = f"{row['step']:,}/{row['steps']:,}"
        said = "  ".join(filter(None, [_last(row["metrics"]), row["note"]]))
        lines.append(f"{row['name']:<{width}}  {row['state']:<11}  {steps:>13}  {said}".rstrip())
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    total = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    return "\n".join([*lines, f"{len(rows)} runs: {total}"])


def _last(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the last evaluation's metrics (training's, if there was none) in short form."""
    split = next((name for name in metrics if name != "train"), "train")
    numbers = {k: v for k, v in metrics.get(split, {}).items() if k not in ("step", "count")}
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()][
        :SHOWN
    ]
    return f"{split}: " + "  ".join(shown) if shown else ""


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one row per run: name, state, steps, overrides, last metrics as ``split/metric``.

    Once all runs are done, the text does not depend on the time of writing.
    """
    flat = [
        {f"{s}/{k}": v for s, line in row["metrics"].items() for k, v in line.items()}
        for row in rows
    ]
    overrides = dict.fromkeys(key for row in rows for key in row["overrides"])
    columns = dict.fromkeys(key for line in flat for key in line)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "state", "step", "steps", *overrides, *columns])
    for row, line in zip(rows, flat, strict=True):
        fixed = [row[key] for key in ("name", "state", "step", "steps")]
        given = [row["overrides"].get(key, "") for key in overrides]
        writer.writerow([*fixed, *given, *(line.get(key, "") for key in columns)])
    return text.getvalue()
