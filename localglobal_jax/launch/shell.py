# SPDX-License-Identifier: Apache-2.0
"""Words for shells: quoting, environments, and what nobody should read over a shoulder."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment(given: Iterable[str], outside: Mapping[str, str] | None = None) -> dict[str, str]:
    """``["A=1", "B"]`` -> ``{"A": "1", "B": <its value outside>}``."""
    outside = os.environ if outside is None else outside
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not NAME.fullmatch(name):
            raise ValueError(f"--env {item}: write NAME=VALUE, or NAME to pass on its value")
        if not equals and name not in outside:
            raise ValueError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
        found[name] = value if equals else outside[name]
    return found


def secrets(env: Mapping[str, str]) -> dict[str, str]:
    """Those whose names say that they are secret."""
    return {name: value for name, value in env.items() if SECRET.search(name)}


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it may be shown."""
    return {name: "***" if SECRET.search(name) else value for name, value in env.items()}


def quoted(words: Sequence[str]) -> str:
    """As a shell reads it."""
    return shlex.join(words)


def exports(env: Mapping[str, str]) -> list[str]:
    """Lines of a script. A secret is not written: it must be set where the script runs."""
    return [
        f': "${{{name}:?set it: it is a secret, so it is not written here}}"; export {name}'
        if SECRET.search(name)
        else f"export {name}={shlex.quote(value)}"
        for name, value in env.items()
    ]
