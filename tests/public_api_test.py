# SPDX-License-Identifier: Apache-2.0
"""The public names of the package, the snippet of five lines, and old names, which warn."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import types
import warnings

import pytest

import localglobal_jax as lg
from localglobal_jax.config import renamed, schema, validation
from localglobal_jax.training import loop

DIGITS = "configs/coatnet_digits.py:size=tiny,data=mock"
NAMESPACES = [
    "blocks",
    "config",
    "convert",
    "data",
    "decoding",
    "models",
    "operators",
    "parallel",
    "training",
]


@pytest.mark.parametrize("name", lg.__all__)
def test_every_public_name_is_there(name):
    found = getattr(lg, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    elif name in NAMESPACES:
        assert isinstance(found, types.ModuleType)
    else:
        assert callable(found)
        assert found.__doc__


def test_dir_lists_the_public_names_only():
    assert dir(lg) == sorted(lg.__all__)
    with pytest.raises(AttributeError, match="create_modle"):
        lg.create_modle  # noqa: B018


def names_for_type_checkers(module):
    """The names that the imports under ``if TYPE_CHECKING:`` bind, and the objects they name."""
    found = {}
    for node in ast.parse(pathlib.Path(module.__file__).read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                place = importlib.import_module(line.module)
                for given in line.names:
                    path = f"{line.module}.{given.name}"
                    value = getattr(place, given.name, None) or importlib.import_module(path)
                    found[given.asname or given.name] = value
    return found


@pytest.mark.parametrize("package", ["", ".config", ".data", ".parallel", ".training"])
def test_type_checkers_see_the_names_of_run_time(package):
    module = importlib.import_module(f"localglobal_jax{package}")
    assert names_for_type_checkers(module) == {
        name: getattr(module, name) for name in module.__all__ if name != "__version__"
    }


def test_type_checkers_find_the_module_decoding():
    """The importer of `renamed` resolves it; a stub shows it to those that do not import."""
    folder = pathlib.Path(lg.__file__).parent / "decoding"
    stubs = {file.stem: file.read_text() for file in folder.glob("*.pyi")}
    assert {"__init__", *(n.partition(".")[2] for n in renamed.CURRENT[1:])} == {*stubs}
    for name, text in stubs.items():
        inner = "" if name == "__init__" else f".{name}"
        assert f"from localglobal_jax.inference.decoding{inner} import *" in text


def test_the_typed_project_uses_every_public_name():
    uses = pathlib.Path(__file__).with_name("strangers") / "typed" / "uses.py"
    assert {*re.findall(r"\blg\.(\w+)", uses.read_text())} >= {*lg.__all__}


def test_train_takes_a_config_or_a_checked_run(tmp_path, monkeypatch):
    """Both are the same run to the loop, which one of them enters."""
    config = lg.load_config(DIGITS, steps=1, batch_size=4, optim=dict(warmup_steps=0))
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.eval.every = config.checkpoint.every = 0
    checked = validation.check(config)
    assert lg.train(checked, workdir=tmp_path / "run")["test"]["count"] > 0
    assert (tmp_path / "run" / "config.json").is_file()
    taken = []
    monkeypatch.setattr(loop, "_train", lambda run, *others: taken.append(run))
    for given in (config, checked):
        lg.train(given, tmp_path / "other")
    assert taken == [checked, checked]


def test_train_validates_the_config_before_it_writes(tmp_path):
    config = lg.load_config(DIGITS, steps=0)
    with pytest.raises(ValueError, match="steps"):
        lg.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"optim.learning_rate": 1e-3}, "optim.learning_rate", 1e-3),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate", 1.0),
        ({"steps": 1e3}, "steps", 1000),
        ({"model": {"blocks": {"T": {"head_width": 8}}}}, "model.blocks.T.head_width", 8),
        ({"data": {"image_size": [16, 16]}}, "data.image_size", (16, 16)),
        ({"checkpoint.best": None}, "checkpoint.best", None),
    ],
)
def test_load_config_overrides_fields(overrides, field, value):
    config = lg.load_config(DIGITS, **overrides)
    found = config
    for name in field.split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)
    assert isinstance(validation.check(config), schema.Run)


@pytest.mark.parametrize(
    "overrides", [{"optim.lerning_rate": 1e-3}, {"optim": {"lerning_rate": 1e-3}}]
)
def test_load_config_suggests_the_field(overrides):
    with pytest.raises(ValueError, match="learning_rate"):
        lg.load_config(DIGITS, **overrides)


# ---------------------------------------------------------------------------- old names


def imported_again(old):
    """The module at the old path, as the first import of a process gives it; and its warnings."""
    sys.modules.pop(f"localglobal_jax.{old}", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = importlib.import_module(f"localglobal_jax.{old}")
    told = [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning)]
    return found, [text for text in told if text.startswith(f"localglobal_jax.{old} ")]


@pytest.mark.parametrize("old", renamed.MODULES)
def test_an_old_module_is_the_new_one_and_warns(old):
    found, told = imported_again(old)
    new = importlib.import_module(f"localglobal_jax.{renamed.MODULES[old]}")
    if old in renamed.FUNCTIONS:
        assert callable(found)
        assert all(getattr(found, name) is value for name, value in vars(new).items()
                   if not name.startswith("__"))  # fmt: skip
    else:
        assert found is new
    assert len(told) == (old not in renamed.CURRENT)
    assert all(f"localglobal_jax.{renamed.MODULES[old]}" in text for text in told)


@pytest.mark.parametrize("old", renamed.NAMES)
def test_an_old_name_is_the_new_object_and_warns(old):
    place, _, name = old.rpartition(".")
    new, _, current = renamed.NAMES[old].rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"localglobal_jax.{place}")
    target = importlib.import_module(f"localglobal_jax.{renamed.MODULES.get(place, place)}")
    moved = name not in vars(target)  # otherwise the module still imports it for its own use
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"localglobal_jax.{new}"), current)
    assert [w.filename for w in told if renamed.NAMES[old] in str(w.message)] == [__file__] * moved


@pytest.mark.parametrize(
    "name", ["accounting", "classify", "grad_cam", "layout", "step_context", "translate"]
)
def test_old_attributes_of_the_package_warn(name):
    imported_again(name)
    vars(lg).pop(name)
    sys.modules.pop(f"localglobal_jax.{name}")
    with pytest.warns(DeprecationWarning, match=renamed.MODULES[name]) as told:
        found = getattr(lg, name)
    assert found.__name__ == f"localglobal_jax.{renamed.MODULES[name]}"
    assert told[0].filename == __file__


def test_train_stays_a_function_when_the_old_module_is_imported():
    module, _ = imported_again("train")
    assert module.Preempted is loop.Preempted
    with pytest.raises(ValueError, match="task"):
        lg.train({"task": {"name": "nothing"}}, "unused")


def test_an_old_path_is_not_executed_twice():
    code = (
        "import localglobal_jax.tasks.task as old, localglobal_jax.training.tasks.task as new;"
        "assert old is new; import localglobal_jax.decoding; print('same')"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning:unrelated", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.stdout.strip() == "same", found.stderr
    assert found.stderr.count("DeprecationWarning") == 2  # tasks, tasks.task; not decoding


def test_old_names_lead_somewhere_else():
    assert not set(renamed.MODULES) & set(renamed.MODULES.values())
    assert not set(renamed.NAMES) & set(renamed.NAMES.values())
