# SPDX-License-Identifier: Apache-2.0
"""Words for shells: quoting, environments, and what nobody should read over a shoulder."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
# An address with a password in it, as of a proxy: scheme://user:password@host
INSIDE = re.compile(r"://[^/@\s]*:[^/@\s]*@")
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
    """Those whose names say that they are secret, and addresses with passwords in them."""
    return {n: value for n, value in env.items() if SECRET.search(n) or INSIDE.search(value)}


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it may be shown."""
    hidden = secrets(env)
    return {name: "***" if name in hidden else value for name, value in env.items()}


def without(text: str, env: Mapping[str, str]) -> str:
    """`text`, such as what a tool has said, with the values of secrets masked.

    Not those as short as "true": no secret is, and half of the text would go.
    """
    for value in sorted(secrets(env).values(), key=len, reverse=True):
        text = text.replace(value, "***") if len(value) > 5 else text
    return text


def quoted(words: Sequence[str]) -> str:
    """As a shell reads it."""
    return shlex.join(words)


def exports(env: Mapping[str, str]) -> list[str]:
    """Lines of a script. A secret is not written: it must be set where the script runs."""
    hidden = secrets(env)
    return [
        f': "${{{name}:?set it: it is a secret, so it is not written here}}"; export {name}'
        if name in hidden
        else f"export {name}={shlex.quote(value)}"
        for name, value in env.items()
    ]
