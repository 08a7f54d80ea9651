# SPDX-License-Identifier: Apache-2.0
"""Validates configs: unknown keys, types and bounds. Every error names the field."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict

from localglobal_jax.config import schema
from localglobal_jax.config.values import LARGEST, flatten, leaves, shown, to_tree, tuples


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """Returns the error for a name that is not in `allowed`; it suggests the nearest one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    hint = f'; did you mean "{near[0]}"?' if near else "."
    given = given if len(given) <= 200 else f"{given[:150]}..."
    return ValueError(f'unknown {what} "{given}"{hint} Known: {", ".join(allowed) or "none"}')


def check(config: schema.Run | ConfigDict | Mapping[str, Any]) -> schema.Run:
    """Returns `config` as a frozen `schema.Run`; ValueError lists every wrong field."""
    if isinstance(config, schema.Run):
        return config
    tree = to_tree(config)
    kind = run_class(tree)
    problems = [
        f"config.{field}={shown(value)}: the largest number is {LARGEST:g} (float32)"
        for field, given in flatten(tree).items()
        for value in leaves(tuples(given))
        if isinstance(value, int | float) and LARGEST < abs(value) < math.inf
    ]
    try:
        run = kind.model_validate(tuples(tree))
    except pydantic.ValidationError as error:
        problems = [_explain(e, kind) for e in error.errors(include_url=False)]
    if not problems:
        return run
    raise ValueError("the config is wrong:\n  " + "\n  ".join(problems))


# Fields that a run reads under a condition: its text, and whether a run meets it
READ_IF: Mapping[tuple[str, ...], tuple[str, Callable[[Any], bool]]] = {
    ("optim.momentum",): ("optim.name=sgd", lambda run: run.optim.name == "sgd"),
    ("optim.b1", "optim.b2", "optim.eps"): (
        "optim.name=adamw",
        lambda run: run.optim.name == "adamw",
    ),
    ("optim.end_learning_rate",): (
        "optim.schedule=cosine or linear",
        lambda run: run.optim.schedule in ("cosine", "linear"),
    ),
    ("optim.init_learning_rate",): (
        "optim.warmup_steps above 0",
        lambda run: run.optim.warmup_steps > 0,
    ),
    ("data.area",): ("data.crop=resized", lambda run: run.data.crop == "resized"),
    ("data.pad",): ("data.crop=pad", lambda run: run.data.crop == "pad"),
    tuple(f"data.randaugment_{name}" for name in ("magnitude", "scale", "probability", "noise")): (
        "data.randaugment_layers above 0",
        lambda run: run.data.randaugment_layers > 0,
    ),
    ("task.bleu_tokenizer",): ("task.beam above 0", lambda run: run.task.beam > 0),
    ("data.vocab", "data.joint"): (
        "data.tokenizer=bpe or unigram",
        lambda run: run.data.tokenizer != "dict" or run.data.mock,
    ),
    ("data.layout",): ("data.name=folder", lambda run: run.data.name == "folder"),
    ("data.name", "data.dir", "data.max_bad_records"): (
        "data.files=()",
        lambda run: not getattr(run.data, "files", ()),
    ),
}


def notices(run: schema.Run, overrides: Collection[str]) -> list[str]:
    """Returns a sentence for each of the overridden fields that does less than one may think."""
    found = [
        f"{field} is read with {condition} only"
        for fields, (condition, is_met) in READ_IF.items()
        for field in fields
        if field in overrides and not is_met(run)
    ]
    kept = [f"model.{name}" for name in run.model if name != "name"]
    if "model.name" in overrides and (kept := [name for name in kept if name not in overrides]):
        found.append(f"model.name: these stay as the config file has them: {', '.join(kept)}")
    return found


def run_class(config: ConfigDict | Mapping[str, Any]) -> type[schema.Run]:
    """Returns the class of run that ``task.name`` chooses; ValueError for an unknown name."""
    task = config.get("task")
    default = next(iter(schema.RUNS))
    name = task.get("name", default) if isinstance(task, ConfigDict | Mapping) else default
    if not isinstance(name, str) or name not in schema.RUNS:
        raise ValueError(
            f"config.task.name={shown(name)}: {unknown('task', str(name), schema.RUNS)}"
        )
    return schema.RUNS[name]


def section_of(section: Any, name: str) -> Any:
    """Returns the schema class of a sub-section; None if the schema has none, as for ``model``."""
    if section is None or name not in section.model_fields:
        return None
    kind = section.model_fields[name].annotation
    return kind if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else None


def _explain(error: Mapping[str, Any], kind: type[schema.Run]) -> str:
    """Returns a line for one pydantic error."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = kind
        for name in error["loc"][:-1]:
            section = section_of(section, str(name)) or section
        return f"config.{where}: " + str(
            unknown("key", str(error["loc"][-1]), section.model_fields)
        )
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        *field, count = error["loc"]
        where = ".".join(map(str, field))
        return f"config.{where}={shown(error['input'])}: {count} values are too few"
    if error["type"] == "missing":
        return f"config.{where} is missing"
    given, reason = error["input"], error.get("ctx", {}).get("error", error["msg"])
    if isinstance(reason, ValueError) and isinstance(given, Mapping):
        return f"config.{where}: {reason}"  # fields of a section that do not fit each other
    return f"config.{where}={shown(given)} ({type(given).__name__}): {reason}"


def check_fields(cls: type, values: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless `values` are fields of the dataclass `cls` with the right types.

    `what` names the object in the message. Numbers of a model are limited to [0, 2**24].
    """
    known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}  # linen's own
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        if name not in known:
            raise unknown(f"option of {what}:", name, known)
        try:
            # pydantic does not accept a FrozenDict as a mapping
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
