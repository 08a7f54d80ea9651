# SPDX-License-Identifier: Apache-2.0
"""Expands a sweep of a config file into run descriptions, and validates each run."""

import dataclasses
import fnmatch
import inspect
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.checkpoints.workdir import absolute, is_remote
from localglobal_jax.config import loading, schema, sweeps, validation, values


@dataclasses.dataclass(frozen=True)
class Description:
    """One run, with everything a back end needs."""

    index: int
    name: str
    overrides: Mapping[str, Any]  # values have their fields' types
    run: schema.Run
    workdir: str
    arguments: tuple[str, ...]  # for localglobal: train --config ...


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and their common parts."""

    prefix: str
    base: schema.Run  # the config without overrides
    runs: tuple[Description, ...]


def expand(
    spec: str, root: str, sweep: str = "sweep", given: Mapping[str, str] | None = None
) -> Sweep:
    """Returns all runs of ``FILE[:arg]``. `given`: overrides of the command line, for every run.

    Raises ValueError for an invalid run and for two runs with the same overrides.
    """
    module, arg = loading.load_module(spec)
    function = sweep if sweep.startswith("sweep") else f"sweep_{sweep}"
    known = {name for name in vars(module) if name == "sweep" or name.startswith("sweep_")}
    if function not in known:
        raise validation.unknown(f"sweep of {spec}:", sweep, known)
    given = given or {}
    base = validation.check(loading.load(spec, given))
    prefix = prefix_of(spec, function)
    root = str(absolute(root.rstrip("/") or "/"))

    runs: list[Description] = []
    seen: dict[str, str] = {}
    for index, overrides in enumerate(points(getattr(module, function), arg, f"{spec} {function}")):
        where = f"run {index} of {function}: "
        try:
            run, applied, texts = apply(spec, given, overrides)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        name = sweeps.name(prefix, index, applied)
        twin = seen.setdefault(sweeps.canonical(applied), name)
        if twin != name:
            raise ValueError(f"{name} has the same overrides as {twin}: {shown(applied)}")
        name = known_as(root, name)
        workdir = f"{root}/{name}"
        flags = (f"--config.{field}={text}" for field, text in {**given, **texts}.items())
        arguments = ("train", "--config", spec, "--workdir", workdir, *flags)
        runs.append(Description(index, name, applied, run, workdir, arguments))
    if not runs:
        raise ValueError(f"{function} of {spec} yields nothing")
    return Sweep(prefix, base, tuple(runs))


def prefix_of(spec: str, function: str) -> str:
    """Returns the common prefix of run names: the file (or folder) and the sweep's name, if any."""
    file = pathlib.Path(spec.partition(":")[0])
    stem = file.absolute().parent.name if file.stem == "sweep" else file.stem
    return sweeps.safe(stem + function.removeprefix("sweep"))


def points(function: Any, arg: str | None, where: str) -> list[Mapping[str, Any]]:
    """Returns the overrides that a sweep function yields. Raises ValueError if it fails."""
    try:
        takes = len(inspect.signature(function).parameters)
        found = list(function(arg) if takes else function())
    except ValueError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise ValueError(f"{where} failed: {type(error).__name__}: {error}") from error
    for item in found:
        if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
            raise ValueError(f"{where} yields {item!r}: it has to yield {{'a.field': value}}")
    return found


def apply(
    spec: str, given: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[schema.Run, dict[str, Any], dict[str, str]]:
    """Returns the run with `overrides`, the overrides with their fields' types, and their texts.

    A text is the value of ``--config.a.b=TEXT``. Raises ValueError.
    """
    twice = given.keys() & overrides.keys()
    if twice:
        raise ValueError(f"--config.{sorted(twice)[0]} is a field that the sweep sets")
    config = loading.load(spec, given)
    applied = {k: loading.override_value(config, k, v) for k, v in overrides.items()}
    run = validation.check(config)
    texts = {field: text_of(value) for field, value in applied.items()}
    # A run is started as a command: its words must give the same values.
    there = validation.check(loading.load(spec, {**given, **texts}))
    for field, (here, read) in values.difference(run.model_dump(), there.model_dump()).items():
        raise ValueError(
            f"config.{field}={here!r} cannot be said on a command line, where it would be read as "
            f"{read!r}: give get_config a value of the same type"
        )
    return run, applied, texts


def text_of(value: Any) -> str:
    """Returns `value` as the TEXT of ``--config.field=TEXT``."""
    return value if isinstance(value, str) else repr(value)


def shown(overrides: Mapping[str, Any]) -> str:
    """Returns overrides as one line for people."""
    return "  ".join(f"{key}={text_of(value)}" for key, value in overrides.items()) or "(none)"


def known_as(root: str, name: str) -> str:
    """Returns the existing folder's name of the same run, whose index changes as a sweep grows.

    Without such a folder, returns `name`.
    """
    prefix, digest = name.rsplit("-", 2)[0], name.rsplit("-", 1)[1]
    folder = pathlib.Path(root)
    if is_remote(root) or not folder.is_dir() or (folder / name).exists():
        return name
    same = [p.name for p in folder.glob(f"{prefix}-*-{digest}") if p.is_dir()]
    return min(same, default=name)


def select(runs: Sequence[Description], only: Sequence[str] | None) -> list[Description]:
    """Returns the runs named by `only`: indices (``7``), ranges (``0-999``, both ends included, cut
    at the last run) and patterns of names (``*-1f2e3d4c``). Raises ValueError if one names no run.
    """
    if not only:
        return list(runs)
    chosen = set()
    for pattern in only:
        if numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", pattern):
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            found = {run.index for run in runs if first <= run.index <= last}
        else:
            found = {run.index for run in runs if fnmatch.fnmatchcase(run.name, pattern)}
        if not found:
            raise ValueError(
                f"--only {pattern}: no such run among {len(runs)}, {runs[0].name} to "
                f"{runs[-1].name}: give numbers (7), ranges (0-99) or names ('*-1f2e3d4c')"
            )
        chosen |= found
    return [run for run in runs if run.index in chosen]
