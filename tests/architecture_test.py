# SPDX-License-Identifier: Apache-2.0
"""The house: which file may import which. The table is also in the README and in CONTRIBUTING."""

import ast
import pathlib

import pytest

import localglobal_jax

ROOT = pathlib.Path(localglobal_jax.__file__).parent
FLOORS = [  # a room imports from floors below its own; files of one room see each other
    ["chips", "config_values", "schema"],
    [
        "arrays",
        "configlib",
        "digest",
        "event_file",
        "hosts",
        "memory",
        "mix_token",
        "orbax_mended",
        "reach",
        "sharding",
        "step_context",
        "stores",
        "sweeps",
        "wandb_run",
    ],
    ["in_sequence", "parallel"],
    ["operators"],
    ["blocks"],
    ["class_attention", "layout", "stems_heads"],
    ["models"],
    [
        "accounting",
        "data",
        "decoding",
        "grad_cam",
        "heat_map",
        "losses",
        "metrics",
        "model_card",
        "optim",
        "remote",
        "reporting",
        "scoring",
        "stored",
        "workdir",
    ],
    ["checkpoint", "convert", "health", "tasks", "verification"],
    ["evaluate", "run_report", "train_step"],
    ["classify", "conversion", "translate"],
    [
        "classify_command",
        "convert_command",
        "inspect_command",
        "models_command",
        "plan",
        "report",
        "samples",
        "session",
        "translate_command",
    ],
    ["bench", "launch", "plan_command", "replay", "report_command", "train"],
    ["bench_command", "sweep_command", "train_command"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = {
    "bench_command",
    "chips",
    "schema",
    "config_values",
    "configlib",
    "classify_command",
    "cli",
    "convert_command",
    "inspect_command",
    "models_command",
    "plan.collectives",
    "plan.hlo",
    "plan.lints",
    "plan.process",
    "plan.report",
    "plan.search",
    "plan.table",
    "plan.topologies",
    "plan_command",
    "report_command",
    "train_command",
    "translate_command",
    "stores",
    "sweeps",
    "sweep_command",
    "launch",
}
LIGHT |= {
    f"launch.{path.stem}"
    for path in (ROOT / "launch").glob("*.py")
    if path.stem not in ("__init__", "preview", "status")
}  # these never import jax when they are imported
LINES, FUNCTION = 300, 80


def files():
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def imported(path, *, top_level=False):
    """Our modules that `path` names in import statements, as dotted paths below the package."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            for a in node.names:
                whole = f"{node.module}.{a.name}"
                known = whole.removeprefix("localglobal_jax.") in MODULES
                found.add(whole if known else node.module)
    return {m.removeprefix("localglobal_jax.") for m in found if m.startswith("localglobal_jax.")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    room = name.split(".")[0]
    assert room in LEVEL, f"{room} stands on no floor: give it one in FLOORS"
    for target in imported(MODULES[name]):
        other = target.split(".")[0]
        assert other == room or LEVEL[other] < LEVEL[room], f"{name} imports {target}"


def test_no_cycles():
    graph = {
        name: imported(path, top_level=True) & MODULES.keys() for name, path in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for target in graph[name] - {name}:
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_rooms_stay_small(name):
    path = MODULES[name]
    assert len(path.read_text().splitlines()) <= LINES, f"{name}: split the room"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION, f"{name}.{node.name} is too long"


def test_no_junk_drawers_and_no_import_by_string():
    for name, path in MODULES.items():
        assert name.split(".")[-1] not in {"utils", "common", "misc", "base", "helpers"}
        assert "import_module(" not in path.read_text(), f"{name} hides an import in a string"


def test_only_two_rooms_name_devices():
    fake = "xla_force_host_platform_device_count"
    names = ("jax.devices", "process_index", "process_count", "device_count", "jax.make_mesh")
    for name, path in MODULES.items():
        for word in names:
            assert name in {"hosts", "parallel"} or word not in path.read_text().replace(
                fake, ""
            ), f"{name} names {word}"


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_rooms_import_no_jax(name):
    tree = ast.parse(MODULES[name].read_text())
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(n.split(".")[0] in {"jax", "flax", "optax"} for n in names)
    for target in imported(MODULES[name], top_level=True):
        assert target in LIGHT, f"{name} imports {target}, which is not light"


def test_every_submodule_has_a_name():
    """Automatic names (Dense_0) would make the parameter tree a matter of statement order."""
    import jax
    import numpy as np

    from localglobal_jax import models

    seen = set()  # widths name nothing: of models that differ in nothing else, one will do
    for name in models.list_models():
        module = models.create_model(name)
        inputs = models.example(name)
        sizes = ("depths", "widths", "heads", "hidden", "stem", "classes", "drop_path", "name")
        fields = {k: v for k, v in vars(module).items() if k not in sizes and k[0] != "_"}
        kind = f"{type(module)} {fields} {np.shape(getattr(module, 'stem', 0))}"
        if kind in seen:
            continue
        seen.add(kind)
        stages = zip(module.layout, module.depths, strict=True)
        module = module.clone(depths=tuple(min(2, d) if len(s) == 1 else d for s, d in stages))
        if not isinstance(module, models.EncoderDecoder):
            inputs = (jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"),)
        shapes = jax.eval_shape(
            lambda *x, m=module: m.init(jax.random.key(0), *x, train=False), *inputs
        )
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
            for key in path:
                stem, _, digits = key.key.rpartition("_")
                assert not (digits.isdigit() and stem[:1].isupper()), jax.tree_util.keystr(path)
