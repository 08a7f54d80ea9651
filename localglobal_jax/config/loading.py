# SPDX-License-Identifier: Apache-2.0
"""Loads configs: parses their argument, applies overrides, writes and reads JSON. Imports no jax.

A config is a Python file with ``get_config(arg) -> ml_collections.ConfigDict``. Loading one runs
it, with the rights of the user: use only configs that you trust. A wrong argument
(``FILE:size=tiny``), override (``--config.optim.learning_rate=3e-4``) or value is a `ValueError`
that names the field, the given value and the allowed ones.
"""

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import logging
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from localglobal_jax.config import migrations, schema
from localglobal_jax.config.validation import check, run_class, section_of, unknown
from localglobal_jax.config.values import coerce, parse_value, shown, to_tree

log = logging.getLogger(__name__)
PREFIX = "config_"  # of the names of modules that are configs
PACKAGE = pathlib.Path(__file__).parents[1]


def load(spec: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Returns the config of ``FILE[:arg]`` with overrides as ``{"optim.learning_rate": "3e-4"}``.

    Raises ValueError if the file, its argument or an override is wrong; `validation.check` then
    checks the values.
    """
    spec = os.fspath(spec)
    module, arg = load_module(spec)
    get_config: Callable[..., ConfigDict] = module.get_config
    try:
        with beside(module):
            given = get_config(arg) if arg is not None else get_config()
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        raise ValueError(f"{spec}: get_config failed: {type(error).__name__}: {error}") from error
    config = editable(given)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{spec}: get_config returned {given!r}, not an ml_collections.ConfigDict")
    for field, text in (overrides or {}).items():
        override(config, field, text)
    return config


def editable(config: Any) -> Any:
    """Returns a config whose fields can be set: a mapping, locked, frozen or a dataclass or not.

    The sections of a ConfigDict, and references between its fields, stay.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, ConfigDict | Mapping):
        return config
    if isinstance(config, FrozenConfigDict) or not isinstance(config, ConfigDict):
        config = ConfigDict(config)
    with contextlib.suppress(RequiredValueError):  # a placeholder, met after it is unlocked
        config.unlock()
    for name, value in list(config.items(preserve_field_references=True)):
        if isinstance(value, ConfigDict) or dataclasses.is_dataclass(value):
            section = editable(value)
            if section is not value:
                with config.ignore_type():
                    config[name] = section
    return config


def load_config(spec: str | os.PathLike[str], **overrides: Any) -> ConfigDict:
    """Loads ``FILE[:arg]`` and sets the fields of `overrides`, as Python values.

    A field is a dotted name (``**{"optim.learning_rate": 1e-3}``) or a nested mapping
    (``optim=dict(learning_rate=1e-3)``). The result can be edited; `train` validates it. Raises
    ValueError for an unknown field, as the command line does.

    >>> config = lg.load_config("configs/coatnet_digits.py", optim=dict(learning_rate=1e-3))
    >>> config.optim.learning_rate
    0.001
    >>> lg.load_config("configs/coatnet_digits.py", optim=dict(lerning_rate=1e-3))
    Traceback (most recent call last):
    ValueError: ...
    """
    config = load(spec)
    for field, value in _fields(overrides, run_class(config)):
        override_value(config, field, value)
    return config


def _fields(tree: Mapping[str, Any], section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of nested overrides with their values; a field may hold a mapping, too.

    `section`: the schema of `tree`; None in ``model``, where every mapping is a section.
    """
    for key, value in tree.items():
        inner = section
        for name in key.split("."):
            inner = inner and section_of(inner, name)
        is_section = (
            inner is not None or section is None or f"{prefix}{key}".split(".")[0] == "model"
        )
        if isinstance(value, ConfigDict | Mapping) and value and is_section:
            yield from _fields(value, inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", to_tree(value) if isinstance(value, ConfigDict) else value


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
    """Returns the module of ``FILE[:arg]``, and ``arg``; ValueError without ``get_config``.

    ``NAME.py`` and ``configs/NAME.py`` are also found among the `packaged` configs.
    """
    path, _, arg = spec.partition(":")
    file = config_file(path)
    if file != pathlib.Path(path).expanduser():
        _log_packaged(file)
    module = _import(file)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(arg) -> ConfigDict: it is not a config file")
    return module, arg or None


def config_file(path: str) -> pathlib.Path:
    """Returns the file that ``--config PATH`` loads: the one of that path, or a packaged one."""
    file = pathlib.Path(path).expanduser()
    ours = {name: known for known in packaged() for name in (known.name, f"configs/{known.name}")}
    with contextlib.suppress(OSError):  # not a path: reported by `_import`
        if not file.is_file() and path in ours:
            return ours[path]
    return file


@functools.cache  # once: a sweep loads its config for every run
def _log_packaged(file: pathlib.Path) -> None:
    log.info("config   %s", file)


def packaged() -> list[pathlib.Path]:
    """Returns the files of the configs that come with the package, in the order of their names.

    They are in the package where it was installed from a wheel, and beside it in a clone.
    """
    inside = PACKAGE / "configs"
    return sorted((inside if inside.is_dir() else PACKAGE.parent / "configs").glob("*.py"))


@contextlib.contextmanager
def beside(module: types.ModuleType) -> Iterator[None]:
    """Context manager in which the neighbours of a config can be imported, as those of a script.

    They are forgotten at its end, because another config may have a neighbour of the same name, and
    known again in the next context of the same `module`. What lies deeper, as the packages of a
    virtual environment do, is imported once, as ever.
    """
    folder = pathlib.Path(str(module.__file__)).absolute().parent
    neighbours = vars(module).setdefault("__neighbours__", {})
    before = set(sys.modules)
    for name in neighbours.keys() - before:
        sys.modules[name] = neighbours[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if _is_neighbour(sys.modules[name], name.partition(".")[0], folder):
                neighbours[name] = sys.modules.pop(name)


def _is_neighbour(module: Any, top: str, folder: pathlib.Path) -> bool:
    """Returns whether a module is `top`.py of a folder, or in its package `top`; ours is none."""
    # a package without __init__.py has no file; built-in modules have neither
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if not place or top == PACKAGE.name or top.startswith(PREFIX):
        return False
    return any(pathlib.Path(place).is_relative_to(folder / name) for name in (top, f"{top}.py"))


def import_file(path: str | pathlib.Path) -> types.ModuleType:
    """Imports a Python file by its path; a config builds on its neighbour with it.

    A neighbour that is not there is looked up among the `packaged` configs, since a copy of a
    config may stand alone. Modules in the same folder can be imported, too. Raises ValueError if
    there is no such file, or if running it raises.
    """
    file = pathlib.Path(path).expanduser()
    ours = {known.name: known for known in packaged()}
    return _import(file if file.is_file() else ours.get(file.name, file))


def _import(file: pathlib.Path) -> types.ModuleType:
    try:
        spec = importlib.util.spec_from_file_location(f"{PREFIX}{file.stem}", file)
        missing = not file.is_file()
    except OSError as error:  # not a path, such as a thousand letters
        raise ValueError(f"--config {shown(str(file))}: {error.strerror}") from error
    if missing:
        known = sorted(file.parent.glob("*.py")) if file.parent.is_dir() else []
        ours = [f"configs/{known.name}" for known in packaged()]
        raise unknown("config file", str(file), [str(p) for p in known] or ours)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {file}: want a Python file, NAME.py, with get_config(arg)")
    spec.loader = _FromSource(spec.name, str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names of their annotations
    try:
        with beside(module):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{file}{line}: {type(error).__name__}: {error}") from error
    return module


class _FromSource(importlib.machinery.SourceFileLoader):
    """Loads a file without cached bytecode, and leaves none beside the user's configs.

    Python takes the bytecode of a file that was changed within a second, to the same size.
    """

    def path_stats(self, path: str) -> Any:
        raise OSError(f"{path}: no bytecode")


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
        kind = tuple if isinstance(defaults[key], list) else type(defaults[key])
        free = defaults[key] is None or values[key] is None or key in choices
        if not free and not isinstance(values[key], kind):
            raise ValueError(f"config argument {key}={text}: want {kind.__name__}")
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
        known_before, known = known, section_of(known, name)
        if name not in section:
            former = known_before.model_fields[name].default if known_before is not None else None
            section[name] = ConfigDict(former if isinstance(former, Mapping) else None)
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise ValueError(f"config.{field}: {name} is a value, not a section")
    fields = {} if known is None else known.model_fields
    if known is not None and leaf not in section and leaf not in fields:
        raise unknown(f"config key in {'.'.join(parents) or 'the config'}:", leaf, fields)
    default = fields[leaf].default if leaf in fields else None
    if leaf in section:
        default = None  # of a required placeholder without a value
        with contextlib.suppress(RequiredValueError):
            default = section[leaf]
    if leaf in fields and _may_be_dict(fields[leaf].annotation):
        default = None  # neither a section nor of one type: a Python literal, or a name
    elif leaf in fields and not isinstance(default, ConfigDict):
        default = _example(fields[leaf].annotation, default)
    if known is None and isinstance(default, str | tuple) and all(map(_is_text, default)):
        default = None  # a text or a tuple of texts, as ``model.layout`` may be
    is_section = isinstance(default, ConfigDict | pydantic.BaseModel)
    free = isinstance(default, ConfigDict) and section_of(known, leaf) is None and bool(parents)
    value = read({} if free else default) if free or not is_section else None
    if is_section and not isinstance(value, Mapping):
        raise ValueError(f"config.{field} is a section: set one of its keys, config.{field}.KEY")
    try:
        with section.ignore_type():
            section[leaf] = value
    except (ValueError, OverflowError, TypeError) as error:
        # a dot in a key, an int beyond any float, a key that is no text
        raise ValueError(f"config.{field}={shown(value)}: {error}") from error
    return value


def _example(annotation: Any, value: Any) -> Any:
    """Returns an example of the type that a field has by its annotation; `value` if it has several.

    The value of a config file may be None, or have another type: 1 for a number like 0.5.
    """
    alternatives = _types(annotation)
    kinds = [typing.get_origin(kind) or kind for kind in alternatives]
    for kind in (str, bool, int, float):
        if kind in kinds:
            return kind()
    if tuple in kinds:
        tuple_type = alternatives[kinds.index(tuple)]
        elements = {t for part in typing.get_args(tuple_type) for t in _types(part)} - {...}
        return ("",) if elements == {str} else ()
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _may_be_dict(annotation: Any) -> bool:
    """Returns whether a dict is one of several alternatives of an annotation."""
    kinds = [typing.get_origin(kind) or kind for kind in _types(annotation)]
    return dict in kinds and len(kinds) > 1


def _types(annotation: Any) -> list[Any]:
    """Returns the alternatives of a union, or the one type, without None and without bounds."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _types(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [kind for part in typing.get_args(annotation) for kind in _types(part)]
    return [] if annotation is type(None) else [annotation]


# ---------------------------------------------------------------------------- config.json


def to_json(run: schema.Run) -> str:
    """Returns the run with all defaults, as `config.json` holds it."""
    tree = {"schema": migrations.SCHEMA, **run.model_dump(mode="json")}
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def with_absolute_paths(run: schema.Run, *, without_links: bool = False) -> schema.Run:
    """Returns `run` with absolute paths of its data and weights, for commands in other folders."""

    def absolute(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(absolute, value))
        if not value or "://" in value:
            return value
        return os.path.realpath(value) if without_links else str(pathlib.Path(value).absolute())

    fields = {"dir", "files", "dicts", "label_maps"} & type(run.data).model_fields.keys()
    update = {name: absolute(getattr(run.data, name)) for name in fields}
    data = run.data.model_copy(update=update)
    return run.model_copy(update={"data": data, "init": absolute(run.init)})


def from_saved(tree: Mapping[str, Any]) -> schema.Run:
    """Returns the run of a config that this or an earlier version saved (see `migrations`)."""
    return check(migrations.migrate(tree))


def read_json(file: pathlib.Path, name: str | None = None) -> schema.Run:
    """Reads a file written by `to_json`; ValueError, with `name` or its path, if it is damaged."""
    try:
        return from_saved(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name or file} is damaged, or of another version: {error}") from None
