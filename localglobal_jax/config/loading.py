# SPDX-License-Identifier: Apache-2.0
"""Configs: parse their argument, apply overrides, check them, compare them. Imports no jax.

A config is a Python file with ``get_config(arg) -> ml_collections.ConfigDict``. Three things can be
wrong with one, and each is a `ValueError` that names the field, what was given and what is allowed:
the argument (``FILE:size=tiny``), an override (``--config.optim.learning_rate=3e-4``), a value.
"""

import importlib.util
import json
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict

from localglobal_jax.config import schema
from localglobal_jax.config.validation import check, run_class, section_of, unknown
from localglobal_jax.config.values import LARGEST, fit, flatten, parse_value, shown

# ---------------------------------------------------------------------------- reading


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses ``"size=tiny,steps=100"`` against `defaults`, whose types the values must have.

    A tuple of defaults is a choice, the first being the default. A bare name stands for
    ``name=True`` where the default is a bool.
    """
    choices = {key: value for key, value in defaults.items() if isinstance(value, tuple)}
    defaults = {**defaults, **{key: value[0] for key, value in choices.items()}}
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise unknown("config argument", key, defaults)
        if not equals and not isinstance(defaults[key], bool):
            raise ValueError(f'config argument "{key}" needs a value: write {key}=VALUE')
        values[key] = parse_value(text, defaults[key], key) if equals else True
        if key in choices and values[key] not in choices[key]:
            raise unknown(f"value of the config argument {key}:", text, map(str, choices[key]))
    return ConfigDict(values)


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Loads ``FILE[:arg]`` and applies ``{"optim.learning_rate": "3e-4"}`` to it."""
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


def compared(
    spec: str, overrides: Mapping[str, str], other: str | None, others: Mapping[str, str]
) -> dict[str, schema.Run]:
    """A run, and the one that is set beside it, if any, each under a name for people.

    ``overrides`` are of both, ``others`` of the second, whose file may be the first one's.
    Raises ValueError, which tells the second one's mistakes from the first one's.
    """
    found = {spec: check(load(spec, overrides))}
    if other or others:
        name = " ".join([other or spec, *(f"{k}={v}" for k, v in others.items())])
        try:
            run = check(load(other or spec, {**overrides, **others}))
        except ValueError as error:
            raise ValueError(f"--compare, {name}: {error}") from None
        found[name + " (again)" * (name in found)] = run
    return found


def load_module(spec: str) -> tuple[Any, str | None]:
    """The module behind ``FILE[:arg]``, and ``arg``."""
    path, _, arg = spec.partition(":")
    file = pathlib.Path(path)
    try:
        found_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
        missing = not file.is_file()
    except OSError as error:  # no path at all, such as one of a thousand letters
        raise ValueError(f"--config {shown(path)}: {error.strerror}") from error
    if missing:
        folder = file.parent if file.parent.is_dir() else pathlib.Path("configs")
        found = [str(p) for p in sorted(folder.glob("*.py"))]
        raise unknown("config file", path, found)
    if found_spec is None or found_spec.loader is None:
        raise ValueError(f"--config {path}: want a Python file, NAME.py, with get_config(arg)")
    module = importlib.util.module_from_spec(found_spec)
    try:
        found_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        line = next((f":{e.lineno}" for e in [error] if isinstance(e, SyntaxError)), "")
        raise ValueError(f"{path}{line}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(arg) -> ConfigDict: it is not a config file")
    return module, arg or None


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets ``a.b.c`` of `config` to `text`, read as the type that the field has."""
    _set(config, field, lambda default: parse_value(text, default, f"config.{field}"))


def override_value(config: ConfigDict, field: str, value: Any) -> Any:
    """Sets ``a.b.c`` of `config` to a Python value, as the field's type; returns what it became."""
    return _set(config, field, lambda default: fit(value, default))


def _set(config: ConfigDict, field: str, read: Callable[[Any], Any]) -> Any:
    *parents, leaf = field.split(".")
    section: Any = config
    known: Any = run_class(config)
    for name in parents:
        if known is not None and name not in known.model_fields:
            raise unknown("config section", name, known.model_fields)
        known = section_of(known, name)
        if name not in section:
            section[name] = ConfigDict()
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise ValueError(f"config.{field}: {name} is a value, not a section")
    defaults = {} if known is None else {k: f.default for k, f in known.model_fields.items()}
    if leaf not in section and known is not None and leaf not in defaults:
        raise unknown(f"config key in {'.'.join(parents) or 'the config'}:", leaf, defaults)
    default = section[leaf] if leaf in section else defaults.get(leaf)
    if default is None and known is not None and _is_text(known.model_fields[leaf].annotation):
        default = ""
    if isinstance(default, ConfigDict | pydantic.BaseModel):
        raise ValueError(f"config.{field} is a section: set one of its keys, config.{field}.KEY")
    value = read(default)
    if isinstance(default, float) and type(value) is int:  # else `read` had made a float of it
        raise ValueError(f"config.{field}={shown(value)}: beyond {LARGEST:g}, what float32 holds")
    try:
        with section.ignore_type():
            section[leaf] = value
    except ValueError as error:  # a key of a dictionary with a dot in it
        raise ValueError(f"config.{field}={shown(value)}: {error}") from error
    return value


def _is_text(annotation: Any) -> bool:
    """``str`` or ``str | None``."""
    return annotation is str or str in typing.get_args(annotation)


def to_json(run: schema.Run) -> str:
    """The whole config with its defaults, as `config.json` holds it."""
    return json.dumps(run.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def read_json(file: pathlib.Path) -> schema.Run:
    """The inverse of `to_json`, from a file."""
    try:
        return check(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {error}") from None
