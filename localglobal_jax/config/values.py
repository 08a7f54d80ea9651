# SPDX-License-Identifier: Apache-2.0
"""Values of config fields: parsed from text, coerced, flattened, compared, shown in errors."""

import ast
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

LARGEST = 3.4e38  # float32
BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


def parse_value(text: str, default: Any, field: str) -> Any:
    """Parses a command-line `text` as the type of `default` (None: any type).

    Text that is not a Python literal stays text; the schema then accepts or rejects it. Elements of
    a tuple of texts stay as they are written ("1.10").
    """
    if text == "None" or isinstance(default, str):
        return None if text == "None" else text
    if isinstance(default, bool):
        if text.lower() not in BOOLS:
            raise ValueError(f"{field}={shown(text)}: expected true or false")
        return BOOLS[text.lower()]
    value: Any = text
    words = isinstance(default, tuple) and bool(default) and isinstance(default[0], str)
    if not words or text.lstrip().startswith(("(", "[", "'", '"')):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            value = ast.literal_eval(text)
    if isinstance(default, tuple) and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(default, tuple) and not isinstance(value, list | tuple):
        value = [value]
    return coerce(value, default)


def coerce(value: Any, default: Any) -> Any:
    """Returns `value` as the type of `default` if that is exact: 1 as 1.0, 1e3 as 1000.

    Lists become tuples and NumPy values Python values. Anything else is returned as it is.
    """
    value = tuples(value)
    if {type(value), type(default)} == {int, float}:
        try:
            return pydantic.TypeAdapter(type(default)).validate_python(value)
        except pydantic.ValidationError:
            return value
    return value


def tuples(tree: Any) -> Any:
    """Returns `tree` with tuples for lists, as it was before JSON, and without NumPy's values."""
    if type(tree).__module__ == "numpy":
        tree = tree.tolist()
    if isinstance(tree, Mapping):
        return {key: tuples(value) for key, value in tree.items()}
    return tuple(map(tuples, tree)) if isinstance(tree, list | tuple) else tree


def leaves(value: Any) -> list[Any]:
    """Returns the elements of nested tuples, in order."""
    return [x for part in value for x in leaves(part)] if isinstance(value, tuple) else [value]


def to_tree(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as a plain nested dict. Raises ValueError for required values not given."""
    if not isinstance(config, ConfigDict | Mapping):
        raise ValueError(f"config={shown(config)}: give the result of lg.load_config, or a dict")
    try:
        if isinstance(config, ConfigDict):
            return config.to_dict()
        inside = (ConfigDict, dict)
        return {k: to_tree(v) if isinstance(v, inside) else v for k, v in config.items()}
    except RequiredValueError:
        fields = ", ".join(f"--config.{name}=VALUE" for name in _required(config))
        raise ValueError(f"the config requires values that are not set: give {fields}") from None


def _required(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _required(value, f"{prefix}{name}.")
        elif isinstance(value, FieldReference):
            try:
                value.get()
            except RequiredValueError:
                yield f"{prefix}{name}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{"a.b": 1}`` for ``{"a": {"b": 1}}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns ``{field: (old, new)}`` for the fields in which two configs differ."""
    old, new = flatten(tuples(old)), flatten(tuples(new))
    missing = "(not set)"
    pairs = {k: (old.get(k, missing), new.get(k, missing)) for k in sorted(old.keys() | new.keys())}
    return {key: (before, now) for key, (before, now) in pairs.items() if before != now}


def shown(value: Any) -> str:
    """Returns ``repr(value)`` for an error message, shortened to about 200 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or lists in lists
        return f"(a {type(value).__name__} too large to show)"
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"
