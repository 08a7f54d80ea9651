# SPDX-License-Identifier: Apache-2.0
"""Reads the state of a sweep from its workdirs, at any time, also while it runs."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.checkpoints import gcs, objects, reader, steps, workdir
from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.config import schema
from localglobal_jax.launch import exit_codes, pool
from localglobal_jax.launch.expand import Description
from localglobal_jax.models import registry
from localglobal_jax.training import early_stopping
from localglobal_jax.training.reporting import log_reason, metrics_log

CLOCKS = 60  # seconds that the clocks of two machines may be apart
SILENT = 600  # seconds without a line after which a run no longer counts as running
STATES = (
    "done",
    "pruned",
    "running",
    "preempted",
    "failed",
    "unfinished",
    "not started",
    "other config",
)
LAST_RATE = "last_learning_rate"  # decayed: not the swept optim.learning_rate
SHOWN = 4  # metrics of a split in the table; the CSV has all


def read(
    run: Description, now: float | None = None, fields: Sequence[str] = (), whole: bool = False
) -> dict[str, Any]:
    """Returns the state, step, last metrics by split and age of the last line of a run.

    Args:
      now: seconds since 1970; None for the clock's.
      fields: fields of the config whose values in force are returned as ``settings``.
      whole: whether to look up devices, commit and bytes on disk too, which takes more requests.
    """
    mirror = gcs.LocalMirror(run.workdir)
    directory = mirror.local
    lines = metrics_log.read_metrics(directory)
    metrics: dict[str, dict[str, Any]] = {}
    for line in lines:
        metrics[line["split"]] = {k: v for k, v in line.items() if k != "split"}
    saved = latest_step(run.workdir)
    machine = _environment(mirror, saved) if whole else {}
    logs = _logs(run, directory)
    events = pool.events(logs / pool.ATTEMPTS)
    last = events[-1] if events else {}
    marks = [float(last["time"])] if "time" in last else []
    if (directory / "metrics.jsonl").exists():
        marks.append(objects.modified(workdir.absolute(run.workdir), "metrics.jsonl"))
    age = max(0.0, (time.time() if now is None else now) - max(marks)) if marks else None
    if is_remote(run.workdir) and len(marks) == 2 and marks[1] > marks[0] + CLOCKS:
        last = {}  # another machine went on with the run
    # A lock on another machine cannot be seen; a run writes to a bucket only when it saves.
    locked = pool.is_locked(logs) or (None if is_remote(run.workdir) else False)
    total = steps_of(run.run, run.workdir, saved)
    about = metrics_log.about_run(run.run.model_dump())
    state, note = _state(run, saved, last, age, locked, steps=total)
    if state == "failed":
        note += f": {reason}" if (reason := _reason(events, logs)) else ""
        note += f"; see {logs / pool.LOG}"
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
        "steps": total,
        "saved": saved,
        "age": age,
        "attempts": sum(event.get("event") == "start" for event in events),
        "tags": about.get("tags", ""),
        "note_of_run": about.get("note", ""),
        "overrides": dict(run.overrides),
        "settings": {field: in_force(run.run, field) for field in fields},
        "metrics": metrics,
        "extremes": _extremes(lines),
        "seconds": _seconds(events, lines, run.run.batch_size),
        "devices": str(machine.get("devices", "")) if whole else None,
        "commit": machine.get("commit", ""),
        "disk": sum(objects.sizes(workdir.absolute(run.workdir)).values()) if whole else None,
        "workdir": run.workdir,
        "logs": str(logs),
    }


def in_force(run: schema.Run, field: str) -> Any:
    """Returns the value that field ``a.b`` has in `run`, defaults included; None if it has none."""
    found: Any = run.model_dump()
    for name in field.split("."):
        if not isinstance(found, Mapping) or name not in found:
            break
        found = found[name]
    else:
        return found
    section, _, name = field.partition(".")
    if section != "model":
        return None
    model, spec = registry.MODELS.get(run.model["name"], (object, {}))
    default = spec.get(name, getattr(model, name, None))
    return dict(default) if isinstance(default, Mapping) else default


def override_fields(runs: Sequence[Description]) -> list[str]:
    """Returns the fields that any of the runs overrides, in their order."""
    return list(dict.fromkeys(field for run in runs for field in run.overrides))


def _logs(run: Description, directory: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the log and the attempts: here, or where the run wrote them.

    A run in a bucket that two back ends started from here has two: it is that of the last attempt.
    """
    here = [pool.folder(run, backend) for backend in pool.BACKENDS]
    written = [file for folder in here if (file := folder / pool.ATTEMPTS).is_file()]
    return max(written, key=lambda file: file.stat().st_mtime).parent if written else directory


def _reason(events: Sequence[Mapping[str, Any]], logs: pathlib.Path) -> str:
    """Returns the reason of the last attempt's failure, in one line."""
    if known := events[-1].get("reason"):
        return str(known)
    begins = [int(event.get("log", 0)) for event in events if event.get("event") == "start"]
    code = int(events[-1].get("code", 1))
    return log_reason.of_attempt(logs / pool.LOG, code, begins[-1] if begins else 0)


def _extremes(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns last, smallest and largest value of every metric ``split/name``, and their steps.

    The last value may be a text, "nan" or "inf", which the smallest and the largest are not.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        for name, value in line.items():
            if name in ("step", "split"):
                continue
            known = found.setdefault(f"{line['split']}/{name}", {})
            at = line["step"]
            known |= {"last": value, "last_at": at}
            if not isinstance(value, int | float):
                continue
            if value < known.get("min", math.inf):
                known |= {"min": value, "min_at": at}
            if value > known.get("max", -math.inf):
                known |= {"max": value, "max_at": at}
    return found


def _seconds(
    events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], batch: int
) -> float | None:
    """Returns the wall seconds of all attempts; without their times, those of the training steps.

    An attempt without a recorded end counts until the next start, or is left out if it is the last.
    """
    total, began = 0.0, None
    for event in events:
        if began is not None and "time" in event:
            total += max(0.0, float(event["time"]) - began)
        began = float(event["time"]) if event.get("event") == "start" and "time" in event else None
    if total:
        return round(total, 1)
    rates = [(line["step"], _rate(line)) for line in lines if line["split"] == "train"]
    compiled = sum(_plain(line.get("compile_seconds")) for line in lines)
    before = [0, *(step for step, _ in rates)]
    parts = ((step - last, rate) for last, (step, rate) in zip(before, rates, strict=False))
    found = sum(count * batch / rate for count, rate in parts if rate) + compiled
    return round(found, 1) if found else None


def _rate(line: Mapping[str, Any]) -> float:
    """Returns the images or tokens per second of a training line; 0 if it has none."""
    return next((_plain(v) for k, v in line.items() if k.endswith("_per_second")), 0.0)


def _plain(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def environment(directory: str) -> dict[str, str]:
    """Returns the environment that the newest checkpoint of a workdir records; {} if unknown."""
    return _environment(gcs.LocalMirror(directory), latest_step(directory))


def _environment(mirror: gcs.LocalMirror, saved: int | None) -> dict[str, str]:
    """Returns the environment that the newest checkpoint records; {} if unknown.

    ``devices``: "1 x cpu (cpu), 1 host". ``commit``: of the code, if it ran in a git checkout;
    "-dirty" follows if tracked files differed from it, but for results of studies.
    """
    if saved is None:
        return {}
    try:
        document = reader.document_of(mirror.checkpoints, saved)
    except (OSError, ValueError, KeyError):  # damaged: reading the checkpoint reports it
        return {}
    return dict(document.get("metadata", {}).get("environment", {}))


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
    if last.get("event") == pool.PRUNED:
        return "pruned", "stopped by successive halving"
    if last.get("event") == "end":
        code = int(last.get("code", 1))
        # events of earlier versions do not say what followed
        before = "restart" if code == exit_codes.ExitCode.PREEMPTED else "failed"
        if last.get("next", before) in ("restart", "retry", "stopped"):
            there = "nothing was saved" if saved is None else f"saved at step {saved:,}"
            return "preempted", f"{exit_codes.explained(code)}, {there}"
        return "failed", exit_codes.explained(code)
    if locked is None:
        return "unfinished", since
    if age is not None and age < SILENT:
        return "running", since
    return "preempted", f"silent: {since}" if since else "silent"


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
    named = {LAST_RATE if k == "learning_rate" else k: v for k, v in numbers.items()}
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in named.items()]
    shown = shown[:SHOWN]
    return f"{split}: " + "  ".join(shown) if shown else ""


def records(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one record per run: name, state, steps, settings, last metrics as ``split/metric``.

    Commit, tags and note are columns if any run has them.
    The settings are the values in force of every field that any run overrides. Once all runs are
    done, the records do not depend on the time of reading.
    """
    about = {"commit": "commit", "tags": "tags", "note": "note_of_run"}
    about = {column: key for column, key in about.items() if any(row.get(key) for row in rows)}
    return [
        {
            **{key: row[key] for key in ("name", "state", "step", "steps")},
            **{column: row[key] for column, key in about.items()},
            **{field: "" if value is None else value for field, value in row["settings"].items()},
            **{
                f"{split}/{LAST_RATE if name == 'learning_rate' else name}": value
                for split, line in row["metrics"].items()
                for name, value in line.items()
            },
        }
        for row in rows
    ]
