# SPDX-License-Identifier: Apache-2.0
"""Loads configs: parses their argument, applies overrides, writes and reads JSON. Imports no jax.

A config is a Python file with ``get_config(arg) -> ml_collections.ConfigDict``. Loading one runs
it, with the rights of the user: use only configs that you trust. A wrong argument
(``FILE:size=tiny``), override (``--config.optim.learning_rate=3e-4``) or value is a `ValueError`
that names the field, the given value and the allowed ones.
"""

import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict

from localglobal_jax.config import schema
from localglobal_jax.config.validation import check, run_class, section_of, unknown
from localglobal_jax.config.values import coerce, flatten, parse_value, shown


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Returns the config of ``FILE[:arg]`` with overrides as ``{"optim.learning_rate": "3e-4"}``.

    Raises ValueError if the file, its argument or an override is wrong; `validation.check` then
    checks the values.
    """
    module, arg = load_module(spec)
    get_config: Callable[..., ConfigDict] = module.get_config
    try:
        config = get_config(arg) if arg is not None else get_config()
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        raise ValueError(f"{spec}: get_config failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{spec}: get_config returned {config!r}, not an ml_collections.ConfigDict"
        )
    for field, text in (overrides or {}).items():
        override(config, field, text)
    return config


def load_config(spec: str, **overrides: Any) -> ConfigDict:
    """Loads ``FILE[:arg]`` and sets the fields of `overrides`, as Python values.

    A field is a dotted name (``**{"optim.learning_rate": 1e-3}``) or a nested mapping
    (``optim=dict(learning_rate=1e-3)``). The result can be edited; `train` validates it. Raises
    ValueError for an unknown field, as the command line does.
    """
    config = load(spec)
    plain = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in overrides.items()}
    for field, value in flatten(plain).items():
        override_value(config, field, value)
    return config


def load_runs(
    spec: str, overrides: Mapping[str, str], other: str | None, others: Mapping[str, str]
) -> dict[str, schema.Run]:
    """Returns the checked run of `spec` and the one to compare with it, if any, by display name.

    `overrides` apply to both, `others` to the second, which has the file `other` or else `spec`.
    Raises ValueError; the message says which of the two runs is wrong.
    """
    runs = {spec: check(load(spec, overrides))}
    if other or others:
        name = " ".join([other or spec, *(f"{k}={v}" for k, v in others.items())])
        try:
            run = check(load(other or spec, {**overrides, **others}))
        except ValueError as error:
            raise ValueError(f"--compare, {name}: {error}") from None
        runs[name + " (again)" * (name in runs)] = run
    return runs


# ---------------------------------------------------------------------------- files


def load_module(spec: str) -> tuple[types.ModuleType, str | None]:
    """Returns the module of ``FILE[:arg]``, and ``arg``; ValueError without ``get_config``."""
    path, _, arg = spec.partition(":")
    module = import_file(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(arg) -> ConfigDict: it is not a config file")
    return module, arg or None


def import_file(path: str | pathlib.Path) -> types.ModuleType:
    """Imports a Python file by its path; a config builds on its neighbour with it.

    Raises ValueError if there is no such file, or if running it raises.
    """
    file = pathlib.Path(path)
    try:
        spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
        missing = not file.is_file()
    except OSError as error:  # not a path, such as a thousand letters
        raise ValueError(f"--config {shown(str(path))}: {error.strerror}") from error
    if missing:
        folder = file.parent if file.parent.is_dir() else pathlib.Path("configs")
        raise unknown("config file", str(path), [str(p) for p in sorted(folder.glob("*.py"))])
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {path}: want a Python file, NAME.py, with get_config(arg)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{path}{line}: {type(error).__name__}: {error}") from error
    return module


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses ``"size=tiny,steps=100"``; the values get the types of their `defaults`.

    A tuple of defaults is a choice; its first element is the default. A bare name stands for
    ``name=True`` if the default is a bool. A path may hold commas: after a text with a slash, a
    bare name that is not in `defaults` continues the text (``"init=runs/a,b,size=tiny"``).
    """
    choices = {key: value for key, value in defaults.items() if isinstance(value, tuple)}
    defaults = {**defaults, **{key: value[0] for key, value in choices.items()}}
    values = dict(defaults)
    last = ""  # the argument before this one
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if not equals and key not in defaults and "/" in str(values.get(last)):
            values[last] += f",{part}"
            continue
        last = key
        if key not in defaults:
            raise unknown("config argument", key, defaults)
        if not equals and not isinstance(defaults[key], bool):
            raise ValueError(f'config argument "{key}" needs a value: write {key}=VALUE')
        values[key] = parse_value(text, defaults[key], key) if equals else True
        if key in choices and values[key] not in choices[key]:
            raise unknown(f"value of the config argument {key}:", text, map(str, choices[key]))
    return ConfigDict(values)


# ---------------------------------------------------------------------------- overrides


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets field ``a.b.c`` of `config` to `text`, parsed as the type of the field."""
    _set(config, field, lambda default: parse_value(text, default, f"config.{field}"))


def override_value(config: ConfigDict, field: str, value: Any) -> Any:
    """Sets field ``a.b.c`` to a Python value as the type of the field; returns the value set."""
    return _set(config, field, lambda default: coerce(value, default))


def _set(config: ConfigDict, field: str, read: Callable[[Any], Any]) -> Any:
    """Sets the field to ``read(its value or else its default in the schema)``."""
    *parents, leaf = field.split(".")
    section: Any = config
    known: Any = run_class(config)  # the schema of `section`; None in the free section model
    for name in parents:
        if known is not None and name not in known.model_fields:
            raise unknown("config section", name, known.model_fields)
        known = section_of(known, name)
        if name not in section:
            section[name] = ConfigDict()
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise ValueError(f"config.{field}: {name} is a value, not a section")
    fields = {} if known is None else known.model_fields
    if known is not None and leaf not in section and leaf not in fields:
        raise unknown(f"config key in {'.'.join(parents) or 'the config'}:", leaf, fields)
    default = section[leaf] if leaf in section else fields[leaf].default if fields else None
    if default is None and fields and str in _types(fields[leaf].annotation):
        default = ""
    if isinstance(default, ConfigDict | pydantic.BaseModel):
        raise ValueError(f"config.{field} is a section: set one of its keys, config.{field}.KEY")
    value = read(default)
    try:
        with section.ignore_type():
            section[leaf] = value
    except (ValueError, OverflowError) as error:  # a dot in a key, an int beyond any float
        raise ValueError(f"config.{field}={shown(value)}: {error}") from error
    return value


def _types(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type."""
    return typing.get_args(annotation) or (annotation,)


# ---------------------------------------------------------------------------- config.json


def to_json(run: schema.Run) -> str:
    """Returns the run with all defaults, as `config.json` holds it."""
    return json.dumps(run.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def read_json(file: pathlib.Path, name: str | None = None) -> schema.Run:
    """Reads a file written by `to_json`; ValueError, with `name` or its path, if it is damaged."""
    try:
        return check(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name or file} is damaged, or of another version: {error}") from None
