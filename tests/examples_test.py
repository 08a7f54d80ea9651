# SPDX-License-Identifier: Apache-2.0
"""The examples of the docstrings run, and every public name has one."""

import doctest
import inspect
import json
import pathlib
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.convert import files

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = [lg, lg.operators, lg.blocks, lg.models, lg.decoding, lg.convert]
IMPORTED = {"lg": lg, "jax": jax, "jnp": jnp, "np": np, "nn": nn}
FLAGS = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS
SLOW = ["load_translator"]  # needs a checkpoint of translation
PARSER = doctest.DocTestParser()


def is_data(found):
    """Constants and `functools.partial`, whose ``__doc__`` is that of their class."""
    return not isinstance(found, types.ModuleType | types.FunctionType | type)


def members(module):
    """The functions and classes that a submodule defines; of a package, those of ``__all__``."""
    names = getattr(module, "__all__", vars(module))
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if not is_data(value) and getattr(value, "__module__", module.__name__) == module.__name__
    }


def examples(found):
    return PARSER.get_examples(inspect.getdoc(found) or "")


def public():
    """All documented objects by a name for messages, each once, the packages first."""
    seen = {}
    for package in PACKAGES:
        seen.setdefault(package, package.__name__)
    for package in PACKAGES:
        for name in package.__all__:
            found = getattr(package, name)
            if not is_data(found):
                seen.setdefault(found, f"{package.__name__}.{name}")
            if isinstance(found, types.ModuleType):
                for inner, value in members(found).items():
                    if examples(value) and not isinstance(value, types.ModuleType):
                        seen.setdefault(value, f"{found.__name__}.{inner}")
    return {name: found for found, name in seen.items()}


PUBLIC = public()


def run(names):
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    reports = []
    for name in names:
        text = inspect.getdoc(PUBLIC[name])
        test = PARSER.get_doctest(text, dict(IMPORTED), name, f"<docstring of {name}>", 0)
        runner.run(test, out=reports.append)
    assert not runner.failures, "".join(reports)
    return runner.tries


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_an_example(package):
    shown = " ".join(example.source for example in examples(package))
    for name in package.__all__:
        found = getattr(package, name)
        found = getattr(found, "_function", found)  # another test has imported the old module
        if is_data(found):
            assert re.search(rf"\b{name}\b", shown), f"{name}: none in the package's docstring"
        elif isinstance(found, types.ModuleType):
            inside = [value for value in members(found).values() if examples(value)]
            assert examples(found) or inside, f"{package.__name__}.{name}"
        else:
            assert examples(found), f"{package.__name__}.{name}"


@pytest.mark.parametrize("package", [p.__name__ for p in PACKAGES])
def test_the_examples_run(package, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)  # the first of them trains the run that others load
    names = [
        name
        for name in PUBLIC
        if name == package
        or (max((p.__name__ for p in PACKAGES if name.startswith(f"{p.__name__}.")), key=len,
                default="") == package)
    ]  # fmt: skip
    slow = [f"localglobal_jax.{name}" for name in SLOW]
    assert run([name for name in names if name not in slow]) > len(names) / 2


@pytest.mark.slow
def test_the_example_of_a_translator_runs(tmp_path, monkeypatch):
    golden = ROOT / "tests" / "golden"
    monkeypatch.chdir(tmp_path)
    pathlib.Path("dict.txt").write_text("".join(f"w{i} 1\n" for i in range(4, 40)))
    files.convert_file(
        "fairseq",
        str(golden / "muse_simple_post.safetensors"),
        "runs/muse",
        arguments=json.loads((golden / "muse_simple_post.json").read_text())["args"],
        dictionaries=["dict.txt"],
    )
    assert run(["localglobal_jax.load_translator"]) == 4
