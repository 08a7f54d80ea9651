# SPDX-License-Identifier: Apache-2.0
"""Sweeps: many runs from one config file, as data. Imports no jax.

A config file may have, beside `get_config`, functions ``sweep()`` and ``sweep_NAME()`` that yield
what each run overrides (they may take the argument of the config, as `get_config` does)::

    def sweep():
        yield {"optim.learning_rate": 1e-3, "model.depths": (1, 2)}
        yield from product({"seed": range(3), "optim.learning_rate": (1e-3, 2e-3)})
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Overrides = dict[str, Any]
# Either overrides one by one, or {field: values}: then every field is a part of its own.
Part = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Any]]

LONGEST = 39  # characters of a name: xpk takes fewer than 40, Kubernetes 63
DIGEST = 8  # hexadecimal digits


def product(*parts: Part) -> Iterator[Overrides]:
    """Every combination; the last part changes fastest."""
    for combination in itertools.product(*_parts(parts)):
        yield merge(combination)


def zip_(*parts: Part) -> Iterator[Overrides]:
    """The first of every part, then the second, ...; ValueError unless they are equally long."""
    lists = _parts(parts)
    if len({len(items) for items in lists}) > 1:
        raise ValueError(f"zip_: parts of {[len(items) for items in lists]} elements: not equal")
    for combination in zip(*lists, strict=True):
        yield merge(combination)


def chain(*parts: Part) -> Iterator[Overrides]:
    """One part after the other."""
    for item in itertools.chain(*_parts(parts)):
        yield dict(item)


def merge(combination: Iterable[Mapping[str, Any]]) -> Overrides:
    """One dict of several; ValueError where two set the same field."""
    merged: Overrides = {}
    for overrides in combination:
        twice = merged.keys() & overrides.keys()
        if twice:
            raise ValueError(f"a sweep sets {sorted(twice)[0]} twice in one run")
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


# ---------------------------------------------------------------------------- names


def canonical(overrides: Mapping[str, Any]) -> str:
    """Overrides as text that neither their order nor list-or-tuple changes."""
    return json.dumps(overrides, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    to_dict = getattr(value, "to_dict", None)  # of a ConfigDict
    return to_dict() if to_dict else repr(value)


def digest(overrides: Mapping[str, Any]) -> str:
    """What a run's name ends in: a function of its overrides alone."""
    return hashlib.sha256(canonical(overrides).encode()).hexdigest()[:DIGEST]


def name(prefix: str, index: int, overrides: Mapping[str, Any]) -> str:
    """E.g. ``coatnet-layouts-003-1f2e3d4c``: a name for Kubernetes, SLURM and file systems.

    Lower case letters, digits and hyphens, at most `LONGEST`; starts with a letter.
    """
    end = f"-{index:03d}-{digest(overrides)}"
    return safe(prefix)[: LONGEST - len(end)].rstrip("-") + end


def cloud_name(name: str, root: str) -> str:
    """`name` for a cloud, where names of several sweeps meet: with a hash of their root."""
    prefix, index, end = name.rsplit("-", 2)
    end = f"-{index}-{end}-{hashlib.sha256(root.encode()).hexdigest()[:4]}"
    return prefix[: LONGEST - len(end)].rstrip("-") + end


def safe(text: str) -> str:
    """`text` without what a name may not have."""
    kept = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return kept if kept[:1].isalpha() else f"run-{kept}".rstrip("-")
