# SPDX-License-Identifier: Apache-2.0
"""Expands a sweep of a config file into run descriptions, and validates each run."""

import dataclasses
import fnmatch
import inspect
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from localglobal_jax.checkpoints import objects, store
from localglobal_jax.checkpoints.workdir import absolute, is_remote
from localglobal_jax.config import loading, schema, sweeps, validation, values


@dataclasses.dataclass(frozen=True)
class Description:
    """One run, with everything a back end needs.

    `index`: its number in the sweep, as in its name, which it keeps when the sweep grows.
    """

    index: int
    name: str
    overrides: Mapping[str, Any]  # values have their fields' types
    run: schema.Run
    workdir: str
    arguments: tuple[str, ...]  # for localglobal: train --config ...

    @property
    def root(self) -> str:
        """The folder of all runs, in the same words however it was given."""
        return self.workdir.rpartition("/")[0]

    @property
    def cloud_name(self) -> str:
        """A name that is unique among the sweeps of a project, and the same at every start."""
        return sweeps.cloud_name(self.name, self.root)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and their common parts."""

    prefix: str
    base: schema.Run  # the config without overrides
    runs: tuple[Description, ...]


class Invalid(NamedTuple):
    """A run that cannot be trained: its number or name, and the reason."""

    run: str
    reason: str


def expand(
    spec: str,
    root: str,
    sweep: str = "sweep",
    given: Mapping[str, str] | None = None,
    *,
    look: bool = False,
    invalid: list[Invalid] | None = None,
) -> Sweep:
    """Returns all runs of ``FILE[:arg]``.

    Args:
      given: overrides of the command line, for every run.
      look: whether to look up in a bucket too which runs are there: they keep their names.
      invalid: receives every invalid run, which is left out.

    Raises:
      ValueError: an invalid run and no list `invalid`, two runs with the same overrides, or no run
        that is valid. All invalid runs are named.
    """
    module, arg = loading.load_module(spec)
    function = sweep if sweep.startswith("sweep") else f"sweep_{sweep}"
    known = {name for name in vars(module) if name == "sweep" or name.startswith("sweep_")}
    if not known:
        raise ValueError(
            f"{spec} has no sweep: write a function sweep() that yields overrides, as in "
            "experiments/muse_results/sweep.py (configs/sweeps.md)"
        )
    if function not in known:
        raise validation.unknown(f"sweep of {spec}:", sweep, known)
    given = given or {}
    base = validation.check(loading.load(spec, given))
    prefix = prefix_of(spec, function)
    root = str(absolute(root.rstrip("/") or "/"))

    refused: list[Invalid] = []
    valid: dict[int, tuple[schema.Run, dict[str, Any], dict[str, str]]] = {}
    seen: dict[str, int] = {}
    with loading.beside(module):
        found = points(getattr(module, function), arg, f"{spec} {function}")
    for place, overrides in enumerate(found):
        try:
            run, applied, texts = apply(spec, given, overrides)
        except ValueError as error:
            refused.append(Invalid(f"run {place} of {function}", str(error)))
            continue
        twin = seen.setdefault(sweeps.canonical(applied), place)
        if twin == place:
            valid[place] = run, applied, texts
        else:
            one, other = (sweeps.name(prefix, i, applied) for i in (place, twin))
            refused.append(Invalid(one, f"the same overrides as {other}: {shown(applied)}"))
    if not found:
        raise ValueError(f"{function} of {spec} yields nothing")
    if refused and (invalid is None or not valid):
        raise ValueError(all_of(refused, len(found)))
    if invalid is not None:
        invalid += refused

    there = names_in(root, prefix) if look or not is_remote(root) else {}
    numbers = numbered({i: sweeps.digest(applied) for i, (_, applied, _) in valid.items()}, there)
    runs = []
    for place, (run, applied, texts) in valid.items():
        index = numbers[place]
        name = sweeps.name(prefix, index, applied)
        workdir = f"{root.rstrip('/')}/{name}"
        runs.append(describe(spec, workdir, index, {**given, **texts}, applied, run))
    return Sweep(prefix, base, tuple(runs))


def describe(  # noqa: PLR0917 # a record
    spec: str,
    workdir: str,
    index: int,
    texts: Mapping[str, str],
    overrides: Mapping[str, Any],
    run: schema.Run,
) -> Description:
    """Returns the description of a run; `texts`: all its overrides as ``--config.field=TEXT``."""
    flags = (f"--config.{field}={text}" for field, text in texts.items())
    arguments = ("train", "--config", spec, "--workdir", workdir, *flags)
    name = workdir.rpartition("/")[2]
    return Description(index, name, overrides, run, workdir, arguments)


def all_of(invalid: Sequence[Invalid], runs: int) -> str:
    """Returns the message of invalid runs among `runs`, with equal reasons once."""
    runs_of: dict[str, list[str]] = {}
    for run, reason in invalid:
        runs_of.setdefault(reason, []).append(run)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in runs_of.items()]
    if len(invalid) == 1:
        return lines[0]
    return "\n".join([f"{len(invalid)} of {runs} runs are wrong:", *lines])


def prefix_of(spec: str, function: str) -> str:
    """Returns the common prefix of run names: the file (or folder) and the sweep's name, if any."""
    file = pathlib.Path(spec.partition(":")[0])
    stem = file.absolute().parent.name if file.stem == "sweep" else file.stem
    return sweeps.safe(stem + function.removeprefix("sweep"))


def points(function: Any, arg: str | None, where: str) -> list[Mapping[str, Any]]:
    """Returns the overrides that a sweep function yields. Raises ValueError if it fails."""
    found = called(function, arg, where)
    if not isinstance(found, Iterable):
        raise ValueError(f"{where} returns {found!r}: it has to yield {{'a.field': value}}")
    found = list(found)
    for item in found:
        if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
            raise ValueError(f"{where} yields {item!r}: it has to yield {{'a.field': value}}")
    return found


def called(function: Any, arg: str | None, where: str) -> Any:
    """Returns the result of a function of a config file; of a generator, a list.

    `arg`: of ``FILE:arg``, for a function that takes one. Raises ValueError if the function fails.
    """
    try:
        found = function(arg) if inspect.signature(function).parameters else function()
        return list(found) if isinstance(found, Iterator) else found
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        raise ValueError(f"{where} failed: {type(error).__name__}: {error}") from error


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


def names_in(root: str, prefix: str) -> dict[str, int]:
    """Returns digest and number of every run of a sweep that has a folder in `root`.

    If a run has two folders, as of a copy, it is the one with the smaller number. Raises ValueError
    where the bucket does not exist or reading is not permitted.
    """
    found: dict[str, int] = {}
    with store.final_is_wrong():
        folders = objects.folders(absolute(root))
    for name in folders:
        parts = re.fullmatch(r"(.+)-(\d{3,})-([0-9a-f]+)", name)
        if parts and parts[1] == sweeps.stem(prefix, int(parts[2])):
            found[parts[3]] = min(int(parts[2]), found.get(parts[3], int(parts[2])))
    return found


def numbered(digests: Mapping[int, str], there: Mapping[str, int]) -> dict[int, int]:
    """Returns the number of every run, by its place in the sweep.

    `digests`: by place. `there`: the numbers of runs with folders, by digest: they keep these. A
    new run gets its place as its number unless that is taken, else one beyond all others.
    """
    kept = {place: there[digest] for place, digest in digests.items() if digest in there}
    taken = set(there.values())
    beyond = itertools.count(max([*digests, *taken], default=0) + 1)
    return {
        place: kept[place] if place in kept else next(beyond) if place in taken else place
        for place in digests
    }


def select(runs: Sequence[Description], only: Sequence[str] | None) -> list[Description]:
    """Returns the runs named by `only`: numbers (``7``), ranges (``0-999``, both ends included, cut
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
