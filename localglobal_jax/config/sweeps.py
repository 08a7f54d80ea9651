# SPDX-License-Identifier: Apache-2.0
"""Sweeps: many runs from one config file, as data. Imports no jax.

A config file may define, besides `get_config`, functions ``sweep()`` and ``sweep_NAME()`` that
yield the overrides of each run. They may take the argument of the config, as `get_config` does::

    def sweep():
        yield {"optim.learning_rate": 1e-3, "model.depths": (1, 2)}
        yield from product({"seed": range(3), "optim.learning_rate": (1e-3, 2e-3)})

A function ``search()`` or ``search_NAME()`` returns a space instead, from which a search draws::

    def search():
        return {"optim.learning_rate": uniform(1e-4, 1e-2, log=True), "seed": choice(0, 1)}
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Overrides = dict[str, Any]
# Either a list of overrides, or {field: values}, where every field is a part by itself.
Part = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Any]]

LONGEST = 39  # characters of a name: xpk allows fewer than 40, Kubernetes 63
DIGEST = 8  # hexadecimal digits


def product(*parts: Part) -> Iterator[Overrides]:
    """Yields every combination; the last part changes fastest."""
    for combination in itertools.product(*_parts(parts)):
        yield _merge(combination)


def zip_(*parts: Part) -> Iterator[Overrides]:
    """Yields the first of every part, then the second, ...; ValueError if lengths differ."""
    lists = _parts(parts)
    if len({len(items) for items in lists}) > 1:
        raise ValueError(f"zip_: parts of unequal lengths {[len(items) for items in lists]}")
    for combination in zip(*lists, strict=True):
        yield _merge(combination)


def chain(*parts: Part) -> Iterator[Overrides]:
    """Yields one part after the other."""
    for item in itertools.chain(*_parts(parts)):
        yield dict(item)


def _merge(combination: Iterable[Mapping[str, Any]]) -> Overrides:
    """Merges dicts into one; ValueError if two set the same field."""
    merged: Overrides = {}
    for overrides in combination:
        twice = merged.keys() & overrides.keys()
        if twice:
            raise ValueError(f"a sweep sets {min(twice)} twice in one run: remove one of the two")
        merged.update(overrides)
    return merged


def _parts(parts: Iterable[Part]) -> list[list[Mapping[str, Any]]]:
    found: list[list[Mapping[str, Any]]] = []
    for part in parts:
        if not isinstance(part, Mapping):
            found.append(list(part))
            continue
        for field, values in part.items():
            if isinstance(values, str | bytes) or not isinstance(values, Iterable):
                raise ValueError(f"{field}: give a list of values, not {values!r}")
            found.append([{field: value} for value in values])
    return found


# ---------------------------------------------------------------------------- spaces of a search


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included: of a search, not of a list of runs."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            positive = ", and low > 0 with log=True" if self.log else ""
            raise ValueError(f"{self}: want low < high{positive}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of `values`."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len({canonical({"": value}) for value in self.values}) < max(1, len(self.values)):
            raise ValueError(f"{self}: want at least one value, and none twice")


Space = Mapping[str, Range | Choice]  # by field


def uniform(low: float, high: float, *, log: bool = False) -> Range:
    """Returns the numbers from `low` to `high`; `log`: uniform in their logarithm."""
    return Range(low, high, log)


def integers(low: int, high: int, *, log: bool = False) -> Range:
    """Returns the integers from `low` to `high`, both included."""
    return Range(low, high, log, whole=True)


def choice(*values: Any) -> Choice:
    """Returns the choice of one of `values`."""
    return Choice(values)


# ---------------------------------------------------------------------------- names


def canonical(overrides: Mapping[str, Any]) -> str:
    """Returns overrides as text, the same for any order and for lists as for tuples."""
    return json.dumps(overrides, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    to_dict = getattr(value, "to_dict", None)  # ConfigDict
    return to_dict() if to_dict else repr(value)


def digest(overrides: Mapping[str, Any]) -> str:
    """Returns the hash that ends the name of a run; it depends on the overrides only."""
    return hashlib.sha256(canonical(overrides).encode()).hexdigest()[:DIGEST]


def name(prefix: str, index: int, overrides: Mapping[str, Any]) -> str:
    """Returns a name for Kubernetes, SLURM and file systems: ``coatnet-layouts-003-1f2e3d4c``.

    It has at most `LONGEST` lower-case letters, digits and hyphens, and starts with a letter.
    """
    return f"{stem(prefix, index)}-{index:03d}-{digest(overrides)}"


def stem(prefix: str, index: int) -> str:
    """Returns the first part of a run's name: `prefix`, cut so that number and hash fit."""
    return safe(prefix)[: LONGEST - len(f"-{index:03d}-") - DIGEST].rstrip("-")


def cloud_name(name: str, root: str) -> str:
    """Returns `name` with a hash of the sweep's root, unique among all sweeps of a project."""
    prefix, index, end = name.rsplit("-", 2)
    end = f"-{index}-{end}-{hashlib.sha256(root.encode()).hexdigest()[:4]}"
    return prefix[: LONGEST - len(end)].rstrip("-") + end


def safe(text: str) -> str:
    """Returns `text` in lower case, with hyphens for the characters that names may not have."""
    kept = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return kept if kept[:1].isalpha() else f"run-{kept}".rstrip("-")
