# SPDX-License-Identifier: Apache-2.0
"""Shell quoting, environment variables, and masking of secrets."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
# An address that contains a password, such as a proxy's: scheme://user:password@host
INSIDE = re.compile(r"://[^/@\s]*:[^/@\s]*@")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment(given: Iterable[str], outside: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns ``{"A": "1", "B": outside["B"]}`` for ``["A=1", "B"]``. Raises ValueError.

    `outside` is this process's environment by default.
    """
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
    """Returns the variables with a secret's name (KEY, TOKEN, ...) or a password in an address."""
    return {n: value for n, value in env.items() if SECRET.search(n) or INSIDE.search(value)}


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """Returns `env` with ``***`` for every secret."""
    hidden = secrets(env)
    return {name: "***" if name in hidden else value for name, value in env.items()}


def without(text: str, env: Mapping[str, str]) -> str:
    """Returns `text`, such as a tool's output, with the values of secrets masked.

    Values of up to 5 characters stay: "true" is not a secret, and would mask half of the text.
    """
    for value in sorted(secrets(env).values(), key=len, reverse=True):
        text = text.replace(value, "***") if len(value) > 5 else text
    return text


def quoted(words: Sequence[str]) -> str:
    """Returns `words` as one line of shell code."""
    return shlex.join(words)


def required(name: str) -> str:
    """Returns a command that ends a script in which the secret `name` is not set."""
    return f': "${{{name}:?set it: it is a secret, so it is not written here}}"'


def exports(env: Mapping[str, str]) -> list[str]:
    """Returns lines of a script; a secret is not written, but must be set where the script runs."""
    hidden = secrets(env)
    return [
        f"{required(name)}; export {name}"
        if name in hidden
        else f"export {name}={shlex.quote(value)}"
        for name, value in env.items()
    ]
