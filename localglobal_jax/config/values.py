# SPDX-License-Identifier: Apache-2.0
"""Values of config fields: from the text of a command line, from a sweep, and as text in errors."""

import ast
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def to_tree(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A plain nested dict."""
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{field: (old, new)}`` for every field in which two configs differ."""
    old, new = flatten(tuples(old)), flatten(tuples(new))
    missing = "(not set)"
    return {
        key: (old.get(key, missing), new.get(key, missing))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    }


LARGEST = 3.4e38  # what float32 holds


def parse_value(text: str, default: Any, field: str) -> Any:
    """Reads a command-line `text` as a value of the type that `default` has (None: any type)."""
    if text == "None" or isinstance(default, str):
        return None if text == "None" else text
    if isinstance(default, bool):
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError(f"{field}={shown(text)}: expected true or false")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text  # a bare word; the schema decides whether it may be one
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < LARGEST else value
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    if isinstance(default, tuple) and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return value


def fit(value: Any, default: Any) -> Any:
    """`value` as the type of `default`, where nothing is lost: 1 as 1.0, 1e3 as 1000, lists."""
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if isinstance(default, float) and type(value) is int and abs(value) < LARGEST:
        return float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return tuples(value)


def shown(value: Any) -> str:
    """For an error: a value as Python writes it, if that is not endless."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or lists in lists
        return f"(a {type(value).__name__} too large to show)"
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def leaves(value: Any) -> list[Any]:
    """Of tuples in tuples."""
    return [x for part in value for x in leaves(part)] if isinstance(value, tuple) else [value]


def tuples(tree: Any) -> Any:
    """Lists as tuples, the inverse of what JSON does to a config."""
    if isinstance(tree, Mapping):
        return {key: tuples(value) for key, value in tree.items()}
    return tuple(map(tuples, tree)) if isinstance(tree, list | tuple) else tree
