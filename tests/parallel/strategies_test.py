# SPDX-License-Identifier: Apache-2.0
"""Every strategy computes what one device does: eight fake devices, in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
STRATEGIES = {
    "one device": {},
    "replicate": {},
    "reference": {"implementation": "reference"},
    "pmap": {"compile": "pmap"},
    "pmap, statistics per device": {"compile": "pmap", "batch_norm": "per_device"},
    "fsdp": {"strategy": "fsdp", "mesh": {"data": 2, "fsdp": 4}},
    "tensor": {"strategy": "tensor", "mesh": {"data": 4, "model": 2}},
    "fsdp+tensor": {"strategy": "fsdp+tensor", "mesh": {"data": 2, "fsdp": 2, "model": 2}},
    "all at once": {
        "strategy": "fsdp+tensor",
        "mesh": {"data": 2, "fsdp": 2, "model": 2},
        "remat": "blocks",
        "scan": True,
    },
}
RUNS = {
    "coatnet, few": (
        "coatnet_digits.py:size=tiny,data=mock",
        {"model.drop_path": "0.0", "model.depths": "(1, 1)"},
    ),
    "coatnet": (
        "coatnet_digits.py:size=tiny,data=mock",
        {"model.drop_path": "0.0", "model.depths": "(1, 3)"},
    ),
    "volo": (
        "volo_imagenet.py:size=tiny,data=mock",
        {
            "model.layout": "OS",
            "model.depths": "(2, 1)",
            "model.widths": "(32, 32)",
            "model.strides": "(1, 2)",
            "model.heads": "(4, 4)",
            "model.class_blocks": "1",
            "model.drop_path": "0.0",
            "model.mix_token": "False",  # under pmap every device draws a box of its own
            "batch_size": "16",
        },
    ),
    "focal": (
        "focal_imagenet.py:size=tiny,data=mock",
        {
            "model.layout": "FF",
            "model.depths": "(1, 2)",
            "model.widths": "(16, 32)",
            "model.heads": "(4, 4)",
            "model.expand": "(1, 1)",
            "model.levels": "(2, 2)",
            "model.focal_windows": "(3, 1)",
            "model.drop_path": "0.0",
            "task.mixup": "0.0",  # drawn by every device for itself, too
            "task.cutmix": "0.0",
            "batch_size": "16",
        },
    ),
    "muse": (
        "muse_lohelp.py:size=tiny,data=mock",
        {
            "model.dropout": "0.0",
            "model.widths": "(64, 64)",
            "model.hidden": "(128, 128)",
            "model.heads": "(4, 4)",
        },
    ),
}
ALL = """
import json, sys
import jax
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.parallel import placement, sharding
from localglobal_jax.training import optim
from localglobal_jax.training.step import init_state, make_update
from localglobal_jax.training.tasks import create_task

config, overrides, strategies = map(json.loads, sys.argv[1:])
sharding.SMALL = 0  # split whatever can be split
run = validation.check(loading.load(config, overrides))
task, optimizer = create_task(run), optim.make_optimizer(run.optim, run.steps)
start = jax.device_get(jax.jit(lambda: init_state(task, optimizer, run))())
found = {}
for name, options in strategies.items():
    devices = jax.devices()[: 1 if name == "one device" else 8]
    partitioner = placement.Partitioner(schema.Parallel(**options), devices)
    shapes = jax.eval_shape(lambda: start)
    step = partitioner.compile_step(make_update(task, optimizer, run), shapes)
    constraints = None
    state = partitioner.put(start)
    split = {
        jax.tree_util.keystr(path): str(x.sharding.spec)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if not x.sharding.is_fully_replicated
    }
    if options.get("compile") != "pmap":
        first = partitioner.train_batch(next(task.train_batches(0, 4)))
        constraints = step.lower(state, first).as_text().count("sharding_constraint")
        if "tensor" in partitioner.strategy:  # the gradient and the running statistics
            constraints -= len(jax.tree.leaves(state.variables))
    losses, norms = [], []
    for batch in task.train_batches(0, 4):
        state, (sums, _) = step(state, partitioner.train_batch(batch))
        losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
        norms.append(float(sums["gradient_norm"][0]))
    found[name] = {"losses": losses, "norms": norms, "split": split, "constraints": constraints}
    found[name]["norms_of_batches"] = "batch_stats" in state.variables
print(json.dumps(found))
"""


# Strategies left out: all models do the same there, and one of them shows it.
_ALIKE = ("replicate", "reference", "pmap, statistics per device")
LESS = {"volo": (*_ALIKE, "fsdp+tensor"), "focal": (*_ALIKE, "fsdp+tensor"), "muse": _ALIKE}
# In the suite; the other strategies are combinations of the four that are left.
LESS["coatnet, few"] = ("replicate", "reference", "pmap", "fsdp+tensor", "all at once")
BLOCKS = {"coatnet, few": 2, "coatnet": 4, "volo": 4, "focal": 3, "muse": 2}


@pytest.mark.parametrize("model", RUNS)
def test_the_same_losses_and_what_is_split(model):
    found = run(model)
    check_losses(found)
    check_split(found)
    check_constraints(found, BLOCKS[model])


def run(model):
    """Returns the numbers of every strategy, by its name."""
    config, overrides = RUNS[model]
    asked = {k: v for k, v in STRATEGIES.items() if k not in LESS.get(model, ())}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    arguments = [json.dumps(x) for x in (str(CONFIGS / config), overrides, asked)]
    done = subprocess.run(
        [sys.executable, "-c", ALL, *arguments],
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_losses(found):
    wanted = found["one device"]
    found = dict(found)
    if apart := found.pop("pmap, statistics per device", None):
        same = np.allclose(apart["losses"], wanted["losses"], rtol=2e-4)
        assert same == (not apart["norms_of_batches"])
    for name, other in found.items():
        np.testing.assert_allclose(other["losses"], wanted["losses"], rtol=2e-4, err_msg=name)
        np.testing.assert_allclose(other["norms"][0], wanted["norms"][0], rtol=1e-3, err_msg=name)


def check_constraints(found, blocks):
    """Activations at both edges of a block, forward and backward; with fsdp also its parameters."""
    edges = found["tensor"]["constraints"]
    assert found["one device"]["constraints"] == 0
    assert edges >= 4 * blocks - 1  # images have no gradient, so nor has an edge that they are
    assert found["fsdp"]["constraints"] >= edges + 2 * blocks


def check_split(found):
    """Parameters and both of Adam's moments, by the axis of the strategy; nothing else is."""
    assert not any(found[name]["split"] for name in ("replicate", "pmap") if name in found)
    for strategy, axis in (("fsdp", "fsdp"), ("tensor", "model")):
        for name in {strategy, "fsdp+tensor"} & found.keys():
            split = [path for path, spec in found[name]["split"].items() if f"'{axis}'" in spec]
            for part in (".variables", ".mu", ".nu"):
                assert any(part in path for path in split), (name, part)
    attention = [k for k, v in found["tensor"]["split"].items() if "qkv" in k or "query" in k]
    assert attention and all("'model'" in found["tensor"]["split"][path] for path in attention)
