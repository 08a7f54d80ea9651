# SPDX-License-Identifier: Apache-2.0
"""Validates configs: unknown keys, types, bounds; every error names the field."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict

from localglobal_jax.config import schema
from localglobal_jax.config.values import LARGEST, flatten, leaves, shown, to_tree, tuples

# ---------------------------------------------------------------------------- did you mean


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not one of `allowed`, with the nearest one suggested."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    hint = f'; did you mean "{near[0]}"?' if near else "."
    given = given if len(given) <= 200 else f"{given[:150]}..."
    return ValueError(f'unknown {what} "{given}"{hint} Known: {", ".join(allowed) or "none"}')


def section_of(section: Any, name: str) -> Any:
    """The schema class of a sub-section, or None where the schema leaves it free (model)."""
    if section is None or name not in section.model_fields:
        return None
    kind = section.model_fields[name].annotation
    return kind if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else None


# ---------------------------------------------------------------------------- checking


def check(config: ConfigDict | Mapping[str, Any]) -> schema.Run:
    """`config` as a frozen, typed `schema.Run`, or a ValueError that lists every wrong field."""
    tree = to_tree(config)
    kind = run_class(tree)
    problems = [
        f"config.{field}={shown(value)}: beyond {LARGEST:g}, what float32 holds"
        for field, value in flatten(tree).items()
        if isinstance(value, int | float) and LARGEST < abs(value) < math.inf
    ]
    try:
        run = kind.model_validate(tuples(tree))
    except pydantic.ValidationError as error:
        problems = [_explain(e, kind) for e in error.errors(include_url=False)]
    if not problems:
        return run
    raise ValueError("the config is wrong:\n  " + "\n  ".join(problems))


def run_class(config: ConfigDict | Mapping[str, Any]) -> type[schema.Run]:
    """The kind of run that ``task.name`` names: it decides what the other sections may hold."""
    task = config.get("task")
    default = next(iter(schema.RUNS))
    name = task.get("name", default) if isinstance(task, ConfigDict | Mapping) else default
    if not isinstance(name, str) or name not in schema.RUNS:
        raise ValueError(
            f"config.task.name={shown(name)}: {unknown('task', str(name), schema.RUNS)}"
        )
    return schema.RUNS[name]


def _explain(error: Mapping[str, Any], kind: type[schema.Run]) -> str:
    """One line for one pydantic error."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = kind
        for name in error["loc"][:-1]:
            section = section_of(section, str(name)) or section
        return f"config.{where}: " + str(
            unknown("key", str(error["loc"][-1]), section.model_fields)
        )
    if error["type"] == "missing":
        return f"config.{where} is missing"
    given, reason = error["input"], error.get("ctx", {}).get("error", error["msg"])
    if isinstance(reason, ValueError) and isinstance(given, Mapping):
        return f"config.{where}: {reason}"  # fields of a section that do not fit each other
    return f"config.{where}={shown(given)} ({type(given).__name__}): {reason}"


def check_fields(cls: type, values: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless `values` are fields of the dataclass `cls`, of the right types."""
    known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}  # linen's own
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        if name not in known:
            raise unknown(f"option of {what}:", name, known)
        try:
            # pydantic takes no FrozenDict for a mapping
            plain = tuples(value) if isinstance(value, Mapping) else value
            pydantic.TypeAdapter(hints[name]).validate_python(plain, strict=True)
        except pydantic.ValidationError as error:
            reason = "; ".join(e["msg"] for e in error.errors(include_url=False))
            raise ValueError(f"{what}: {name}={shown(value)}: {reason}") from None
        numbers = leaves(value) if not isinstance(value, Mapping) else []  # blocks check their own
        if not all(0 <= v <= 2**24 for v in numbers if isinstance(v, int | float)):  # no nan
            raise ValueError(
                f"{what}: {name}={shown(value)}: numbers of a model are from 0 to {2**24}"
            )
