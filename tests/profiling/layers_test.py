# SPDX-License-Identifier: Apache-2.0
"""Layer names of compiled programs: every family, every form of its blocks, and decoding."""

import pathlib
import re

import jax
import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import placement
from localglobal_jax.profiling import abstract_task, compile, roofline
from localglobal_jax.training import optim
from localglobal_jax.training.step import init_state, make_update

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RUNS = {
    "coatnet": ("coatnet_digits.py:size=tiny", {"model.depths": "(1, 2)"}),
    "volo": (
        "volo_imagenet.py:size=tiny",
        {
            "model.layout": "OS",
            "model.depths": "(2, 1)",
            "model.widths": "(24, 48)",
            "model.strides": "(1, 2)",
            "model.heads": "(2, 4)",
        },
    ),
    "focal": (
        "focal_imagenet.py:size=tiny",
        {
            "model.layout": "FF",
            "model.depths": "(1, 2)",
            "model.widths": "(16, 32)",
            "model.heads": "(2, 2)",
            "model.expand": "(2, 2)",
            "model.levels": "(2, 2)",
            "model.focal_windows": "(3, 1)",
        },
    ),
    "muse": ("muse_lohelp.py:size=tiny", {"model.depths": "(2, 2)"}),
}
FORMS = {"unrolled": {}, "remat and scan": {"remat": "blocks", "scan": "True"}}
# Parameters that another module applies: the fused expansion of MBConv is the block's.
APPLIED_ELSEWHERE = {"stage1/block*/expand", "embedding", "position"}
PRODUCTS = ("dot_general", "conv_general_dilated")


def compiled(name, step, form):
    """Returns the operations' names in a compiled step, and the shapes of the parameters."""
    spec, overrides = RUNS[name]
    overrides = overrides | {f"parallel.{k}": v for k, v in FORMS[form].items()}
    run = validation.check(loading.load(str(CONFIGS / spec), {"data.mock": "True"} | overrides))
    partitioner = placement.Partitioner(run.parallel, jax.devices()[:1])
    task, optimizer = abstract_task.create(run), optim.make_optimizer(run.optim, run.steps)
    state = jax.eval_shape(lambda: init_state(task, optimizer, run))
    batch, _ = abstract_task.batch(run, task, train=step == "train")
    if step == "train":
        traced = partitioner.compile_step(make_update(task, optimizer, run), state)
        program = traced.lower(state, batch)
    else:
        traced = partitioner.compile_eval(compile.evaluated(run, task, step))
        program = traced.lower(state.variables, batch)
    text = program.compile().as_text()  # lowered, names in loops begin at the loop
    return re.findall(r'op_name="([^"]*)"', text), state.variables["params"]


def expected(params):
    """Returns the layers that have parameters: ``stage1/block*/attention``."""
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        first, *others = [key.key for key in path[:-1]][:3] or ["position"]
        found.add("/".join([first, *(re.sub(r"\d+$", "*", key) for key in others)]))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RUNS)
def test_layers_of_a_train_step_are_the_modules_with_parameters(name, form):
    names, params = compiled(name, "train", form)
    layers = {name: roofline.layer_of(name, [*params])[0] for name in names}
    known = expected(params)
    assert known - APPLIED_ELSEWHERE <= {*layers.values()}
    unknown = {layer for layer in layers.values() if "block" in layer or "layer" in layer}
    unknown = {"/".join(layer.split("/")[:2]) for layer in unknown}
    assert unknown <= {"/".join(layer.split("/")[:2]) for layer in known}
    products = {layer for name, layer in layers.items() if name.endswith(PRODUCTS)}
    assert products and not products & {"(loss)", "(outside the model)"}


@pytest.mark.parametrize("step", ["eval", "decode"])
def test_layers_of_translation(step):
    names, params = compiled("muse", step, "unrolled")
    layers = {name: roofline.layer_of(name, [*params])[0] for name in names}
    assert {"encoder/layer*/muse", "decoder/layer*/muse", "(model)"} <= {*layers.values()}
    products = {layer for name, layer in layers.items() if name.endswith(PRODUCTS)}
    assert products <= {"encoder/layer*/muse", "decoder/layer*/muse", "(model)"}
