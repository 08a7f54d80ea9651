# SPDX-License-Identifier: Apache-2.0
"""Sets every field of the schema and of the models to wrong values, through `localglobal train`,
stopped before it writes."""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

from localglobal_jax.cli import main
from localglobal_jax.config import loading, schema, values
from localglobal_jax.models import registry
from localglobal_jax.training import setup

Trial = tuple[str, Callable[[], str]]
CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
BASES = {
    "classification": f"{CONFIGS}/coatnet_digits.py:size=tiny,data=mock",
    "translation": f"{CONFIGS}/muse_lohelp.py:size=tiny,data=mock",
}
VALUES = (
    *("abc", "", " ", "None", "True", "-1", "0", "1", "-0.0", "0.5", "1.5", "-1.5", "1e3", "1e30"),
    *("nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "99999999999999999999", "9" * 400),
    *("9" * 5000, "4294967296", "2147483648", "0x10", "1_000", "1j", "b'x'", "...", "'1'", "'abc'"),
    *(
        "()",
        "[]",
        "{}",
        "(1,)",
        "(1, 2)",
        "(0, 0)",
        "(-1, -1)",
        "(1, 2, 3)",
        "(1.5, 2.5)",
        "(nan,)",
    ),
    *("(1e400, 1)", "('a', 'b')", "(None, None)", "{'a': 1}", "{1: 2}", "{[]: 1}", "{'a': -1}"),
    *(
        "[[1]]",
        "((1, 1), (1, 1))",
        "{1, 2}",
        "(((",
        "(" * 300,
        "-" * 3000 + "1",
        "[" * 90 + "]" * 90,
    ),
    *("lambda: 1", "__import__('os')", "a b", "a\nb", "a\0b", "\u2028", "\ud800", "x" * 20_000),
    *("../../etc/passwd", "$(touch x)", "; rm -rf x", "'", '"', "%s{0}", "١٢", "∞", "true", "yes"),
    *("(1000000000, 1000000000)", "(1, 1000000)", "1000000000", "100000000000000"),
)


class Accepted(BaseException):
    """Raised when all checks have passed."""


def trials(scratch: pathlib.Path) -> Iterator[Trial]:
    """Yields (name, function) of every attempt."""
    for kind, base in BASES.items():
        for field in fields(schema.RUNS[kind]):
            for value in VALUES:
                yield _trial(scratch, kind, base, field, value)
        for field in (*model_fields(kind, base), "model.nmae", "optim.lr", "optin.b1", "dtaa", ""):
            for value in VALUES:
                yield _trial(scratch, kind, base, field, value)


def fields(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """All leaves of a section, as ``optim.learning_rate``, and the sections themselves."""
    for name, about in section.model_fields.items():
        if isinstance(about.annotation, type) and issubclass(about.annotation, pydantic.BaseModel):
            yield from fields(about.annotation, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def model_fields(kind: str, base: str) -> Iterator[str]:
    """Returns the fields of the module, and of the blocks that its config sets."""
    name = {"classification": "coatnet", "translation": "muse"}[kind]
    for about in dataclasses.fields(registry.MODELS[name][0]):
        if about.name not in ("parent", "name"):
            yield f"model.{about.name}"
    for field in values.flatten(loading.load(base).model.to_dict()):
        if "." in field:
            yield f"model.{field}"


def _trial(scratch: pathlib.Path, kind: str, base: str, field: str, value: str) -> Trial:
    shown = value if len(value) < 40 else f"{value[:10]}... ({len(value)})"
    return f"{kind}: {field}={shown!r}", lambda: attempt(scratch / "dirty", base, field, value)


def attempt(workdir: pathlib.Path, base: str, field: str, value: str) -> str:
    """Returns works or refused; asserts that an error names the field and no file is left."""

    def accept(*args: Any) -> None:
        raise Accepted

    setup.reserve = accept
    command = ["train", f"--config={base}", f"--workdir={workdir}", f"--config.{field}={value}"]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
        try:
            code = main.main(command)
        except Accepted:
            return "works"
    said = err.getvalue()
    assert code == 2, f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    assert not workdir.exists(), "something was written"
    named = any(part in said for part in (*field.split("."), "checkpoint.best"))
    assert named, f"the field is not named: {said[-600:]}"
    return "refused"
