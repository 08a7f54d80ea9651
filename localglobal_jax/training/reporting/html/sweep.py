# SPDX-License-Identifier: Apache-2.0
"""The facts of a sweep's page: settings, groups of seeds, the best run, failures, charts."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from localglobal_jax.checkpoints import gcs, objects, workdir
from localglobal_jax.config import schema, values
from localglobal_jax.training import metrics
from localglobal_jax.training.reporting import verdicts
from localglobal_jax.training.reporting.html import attempts, curves
from localglobal_jax.training.reporting.html.facts import Run, number, shown
from localglobal_jax.training.reporting.metrics_log import ABOUT

SEED = "seed"  # the field whose values make a group
FILES = ("config.json", "attempts.jsonl", "log.txt")  # one of them makes a folder a run


class Failure(NamedTuple):
    """A run without a result, and the reason."""

    name: str
    reason: str


@dataclasses.dataclass
class Group:
    """The runs of one setting, which differ in their seeds."""

    name: str
    settings: Mapping[str, Any]
    runs: list[Run]
    last: verdicts.Estimate  # of the last value of the metric, over the runs that are done


@dataclasses.dataclass
class Sweep:
    """The facts that a sweep's page shows beside those of every run."""

    root: str
    fields: list[str]  # that differ between runs, the seed last
    names: Mapping[str, str]  # short names of the fields
    settings: Sequence[Mapping[str, Any]]  # by run
    metric: str
    smaller: bool  # whether smaller values are better
    best: Run | None  # of the finished runs, if there are any
    values: list[tuple[float | None, float | None]]  # last and best value, by run
    groups: list[Group]
    failures: list[Failure]


def folders(root: str) -> list[str]:
    """Returns the paths of the runs in `root`; [] if it is a run itself, or holds none."""
    mirror = gcs.LocalMirror(root)
    if (mirror.local / "config.json").exists():
        return []
    found = objects.folders(workdir.absolute(root))
    paths = [f"{root.rstrip('/')}/{name}" for name in found]
    if workdir.is_remote(root):
        names = {name.split("/")[0] for name in objects.sizes(workdir.absolute(root))
                 if name.split("/")[1:] in [[file] for file in FILES]}  # fmt: skip
        return [path for path, name in zip(paths, found, strict=True) if name in names]
    return [p for p in paths if any((pathlib.Path(p) / file).exists() for file in FILES)]


def without_config(path: str) -> Failure | None:
    """Returns a run that never wrote its config, such as one whose config is wrong; else None."""
    directory = gcs.LocalMirror(path).local
    if (directory / "config.json").exists():
        return None
    reason = attempts.failure(directory) or "not started, or nothing was written yet"
    return Failure(path.rstrip("/").rpartition("/")[2], reason)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the fields in which the configs differ, the seed last; without notes and tags."""
    flat = [values.flatten(config) for config in configs]
    fields = dict.fromkeys(field for config in flat for field in config if field not in ABOUT)
    found = [f for f in fields if len({repr(config.get(f)) for config in flat}) > 1]
    return sorted(found, key=lambda field: field == SEED)


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Returns the last part of every field's name, or as much as tells them apart."""
    names = {}
    for field in fields:
        parts, others = field.split("."), [other for other in fields if other != field]
        for last in range(1, len(parts) + 1):
            name = ".".join(parts[-last:])
            if not any(other == name or other.endswith(f".{name}") for other in others):
                break
        names[field] = name
    return names


def label(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Returns settings in one line, "learning_rate=0.002 seed=0"."""
    return " ".join(f"{names[field]}={text(value)}" for field, value in settings.items())


def text(value: Any) -> str:
    """Returns the value of a field for people."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text, value))})"
    return str(value)


def gather(root: str, runs: Sequence[Run], failures: Sequence[Failure]) -> Sweep:
    """Returns the facts of the sweep of `runs`; every run gets its settings as its name."""
    fields = differing([run.config for run in runs])
    names = short_names(fields)
    flat = [values.flatten(run.config) for run in runs]
    settings = [{field: config.get(field) for field in fields} for config in flat]
    for run, chosen in zip(runs, settings, strict=True):
        number_of = run.name.rsplit("-", 2)
        first = number_of[1] if len(number_of) == 3 and number_of[1].isdigit() else run.name
        run.name = f"{first} {label(chosen, names)}".strip()
    metric, smaller = _metric(runs)
    found = [_values(run, metric, smaller) for run in runs]
    known = [(v[1], i) for i, v in enumerate(found) if v[1] is not None]
    finished = [(value, i) for value, i in known if runs[i].finished]
    which = (min if smaller else max)(
        finished or known, key=lambda pair: pair[0], default=(None, None)
    )[1]
    return Sweep(
        root=root.rstrip("/") or "/",
        fields=fields,
        names=names,
        settings=settings,
        metric=metric,
        smaller=smaller,
        best=None if which is None else runs[which],
        values=found,
        groups=_groups(runs, settings, found, names),
        failures=[*failures, *(Failure(run.name, run.reason) for run in runs if run.reason)],
    )


def _metric(runs: Sequence[Run]) -> tuple[str, bool]:
    """Returns the metric that the runs choose their best checkpoint by, else a usual one."""
    best = next((b for r in runs if (b := r.config.get("checkpoint", {}).get("best"))), "")
    known = {name for run in runs for name in run.last()}
    if not best:
        splits = next((s for r in runs if (s := r.config.get("data", {}).get("eval_splits"))), ())
        first = map(schema.evaluation_name, splits[:1])
        usual = [f"{split}/{name}" for split in first for name in metrics.USUAL]
        best = next((name for name in usual if name in known), "train/loss")
    return metrics.direction(best)


def _values(run: Run, metric: str, smaller: bool) -> tuple[float | None, float | None]:
    """Returns the last and the best value of the metric; None for one that is no number."""
    split, _, name = metric.rpartition("/")
    found = [number(line[name]) for line in run.metrics if line["split"] == split and name in line]
    known = [value for value in found if value is not None]
    best = (min if smaller else max)(known) if known else None
    return (found[-1] if found else None), best


def _groups(
    runs: Sequence[Run],
    settings: Sequence[Mapping[str, Any]],
    found: Sequence[tuple[float | None, float | None]],
    names: Mapping[str, str],
) -> list[Group]:
    """Returns the groups of runs that differ in their seed only, in order."""
    members: dict[str, list[int]] = {}
    kept = [{f: v for f, v in chosen.items() if f != SEED} for chosen in settings]
    for i, chosen in enumerate(kept):
        members.setdefault(repr(chosen), []).append(i)
    groups = []
    for which in members.values():
        done = [v for i in which if runs[i].finished and (v := found[i][0]) is not None]
        groups.append(
            Group(
                label(kept[which[0]], names) or "all runs",
                kept[which[0]],
                [runs[i] for i in which],
                verdicts.estimate(done),
            )
        )
    return groups


def charts(sweep: Sweep, runs: Sequence[Run]) -> list[curves.Scatter]:
    """Returns the charts of the finished runs' last value against every field but the seed.

    A field has one if it differs between the finished runs.
    Of two fields, each value of the other is a line; of more, the line is the mean over the others.
    """
    fields = [field for field in sweep.fields if field != SEED]
    found = []
    for field in fields:
        others = [f for f in fields if f != field] if len(fields) == 2 else []
        points = [
            (text(v) if isinstance(v := s[field], list | tuple | bool) or v is None else v,
             label({f: s[f] for f in others}, sweep.names), last, f"{run.name}: {last:.5g}")
            for run, s, (last, _) in zip(runs, sweep.settings, sweep.values, strict=True)
            if last is not None and run.finished
        ]  # fmt: skip
        if len({str(point[0]) for point in points}) > 1:
            found.append(curves.scatter(field, points))
    return found


def interval(estimate: verdicts.Estimate) -> str:
    """Returns "0.95 to 0.97", or "" without an interval."""
    if math.isnan(estimate.low):
        return ""
    return f"{shown(estimate.low)} to {shown(estimate.high)}"
