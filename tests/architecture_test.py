# SPDX-License-Identifier: Apache-2.0
"""The order of the packages, what may import jax, and names of submodules."""

import ast
import pathlib
import subprocess
import sys

import jax
import pytest

import localglobal_jax
from localglobal_jax import models
from localglobal_jax.models import registry

ROOT = pathlib.Path(localglobal_jax.__file__).parent
# A package imports only from those to its left.
ORDER = "config parallel checkpoints operators blocks models data convert inference training profiling launch cli"  # noqa: E501
PACKAGES = ORDER.split()
MAY_NAME_DEVICES = {"parallel"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(name, *, top_level=False):
    """Returns the modules of the package that `name` imports, as paths below it."""
    found = set()
    for node in TREES[name].body if top_level else ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("localglobal_jax.")
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found = {target.removeprefix("localglobal_jax.") for target in found}
    return {target for target in found if target in MODULES and target}


def test_the_root_holds_only_packages():
    flat = {path.stem for path in ROOT.glob("*.py")}
    assert flat == {"__init__", "__main__"}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


def test_imports_point_left():
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        if name.split(".")[0] in PACKAGES
        for target in imported(name)
        if PACKAGES.index(target.split(".")[0]) > PACKAGES.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for target in imported(name, top_level=True) - {name}:
                visit(target)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_only_parallel_names_devices():
    words = {"devices", "process_index", "process_count", "device_count", "make_mesh"}
    wrong = [
        f"{name}: jax.{node.attr}"
        for name, tree in TREES.items()
        if name.split(".")[0] not in MAY_NAME_DEVICES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in words
        and isinstance(node.value, ast.Name)
        and node.value.id == "jax"
    ]
    assert not wrong


HEAVY = ("pydantic", "localglobal_jax.config.schema", "localglobal_jax.parallel.sharding")
LIGHT = "import localglobal_jax.cli.main as main, localglobal_jax.config.sweeps; main.parser()"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (LIGHT, ("jax", "flax", "tensorflow_datasets")),
        ("import localglobal_jax as lg; dir(lg)", ("jax",)),
        ("import localglobal_jax.operators", HEAVY),
    ],
)
def test_light_imports_stay_light(statement, absent):
    """--help, errors of wrong configs and `import localglobal_jax` must not wait for jax."""
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", registry.list_models())
def test_every_submodule_has_a_name(name):
    """Automatic names (Dense_0) would make the parameter tree a matter of statement order."""
    module = registry.create_model(name)
    inputs = registry.example(name)
    stages = zip(module.layout, module.depths, strict=True)
    module = module.clone(depths=tuple(min(2, d) if len(s) == 1 else d for s, d in stages))
    if not isinstance(module, models.EncoderDecoder):
        inputs = (jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"),)
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, train=False), *inputs)
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        for key in path:
            stem, _, digits = key.key.rpartition("_")
            assert not (digits.isdigit() and stem[:1].isupper()), jax.tree_util.keystr(path)
