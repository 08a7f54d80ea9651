# SPDX-License-Identifier: Apache-2.0
"""The attempts of a run (its starts), read from its workdir."""

import contextlib
import datetime
import json
import math
import pathlib
from typing import Any

import google.protobuf.message
from tensorboardX.proto.event_pb2 import Event

from localglobal_jax.data.tfds import tfrecord
from localglobal_jax.training.reporting import log_reason

PRUNED = "pruned"  # the last event of a run that a search has stopped
SAVED = 42  # exit code of a run that was stopped and whose state is saved


def attempts(directory: pathlib.Path, steps: int) -> list[dict[str, str]]:
    """Returns every attempt, from TensorBoard's files and the ``attempts.jsonl`` of a sweep.

    Exit codes are known only for attempts that a sweep has started.
    """
    found = [_session(file) for file in sorted((directory / "tensorboard").glob("events.out.*"))]
    sessions = [session for session in found if session]
    rows = [{**session, "code": None} for session in sessions]
    if events := _events(directory):
        rows = []
        for line in events:
            if line.get("event") == "start":
                rows.append({"began": line["time"], "ended": math.inf, "code": None})
            elif line.get("event") == "end" and rows:
                rows[-1] |= {"ended": line["time"], "code": line.get("code")}
        for row in rows:
            inside = [s for s in sessions if row["began"] <= s["began"] <= row["ended"]]
            if inside:
                row |= {"start": inside[-1]["start"], "last": inside[-1]["last"]}
                row["ended"] = min(row["ended"], max(inside[-1]["ended"], row["began"]))
    return [_attempt(row, steps) for row in rows]


def failure(directory: pathlib.Path) -> str:
    """Returns the reason why the last attempt of a run failed; "" if it did not, or is not known.

    Only a sweep records how an attempt ended.
    """
    found = _events(directory)
    if not found or found[-1].get("event") != "end" or not isinstance(found[-1].get("code"), int):
        return ""
    code = found[-1]["code"]
    if code in (0, SAVED) or found[-1].get("next") == "stopped":  # the sweep itself was
        return ""
    begins = [line.get("log", 0) for line in found if line.get("event") == "start"]
    known = found[-1].get("reason") or log_reason.of_attempt(
        directory / "log.txt", code, begins[-1] if begins else 0
    )
    return f"exit code {code}" + (f": {known}" if known else "")


def is_pruned(directory: pathlib.Path) -> bool:
    """Returns whether a search has stopped the run for good."""
    found = _events(directory)
    return bool(found) and found[-1].get("event") == PRUNED


def _events(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events of ``attempts.jsonl``, without damaged lines; [] without the file."""
    file = directory / "attempts.jsonl"
    lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    return [line for line in map(_event, lines) if line]


def _event(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        return {**line, "time": float(line["time"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _session(file: pathlib.Path) -> dict[str, Any]:
    """Returns the first and last time of an event file, and its first and last step."""
    times, start, last = [], 0, 0
    # the last record of a killed run may be cut off
    with contextlib.suppress(ValueError, OSError, google.protobuf.message.DecodeError):
        for record in tfrecord.read_tfrecord(file):
            event = Event.FromString(record)
            times.append(event.wall_time)
            if event.HasField("session_log"):
                start = max(0, event.step - 1)
            last = max(last, event.step if event.HasField("summary") else start)
    return {"began": times[0], "ended": times[-1], "start": start, "last": last} if times else {}


def _attempt(row: dict[str, Any], steps: int) -> dict[str, str]:
    seconds = row["ended"] - row["began"]
    lasted = str(datetime.timedelta(seconds=round(seconds))) if seconds < 1e9 else ""
    ended = "at the last step" if row.get("last") == steps else "not recorded"
    if row["code"] is not None:
        ended = f"exit code {row['code']}"
    try:
        began = datetime.datetime.fromtimestamp(row["began"], datetime.UTC)
    except (ValueError, OverflowError, OSError):
        began = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return {
        "began": began.strftime("%Y-%m-%d %H:%M:%S"),
        "start": f"{row['start']:,}" if "start" in row else "",
        "last": f"{row['last']:,}" if "last" in row else "",
        "lasted": lasted,
        "ended": ended,
    }
