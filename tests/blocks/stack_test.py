# SPDX-License-Identifier: Apache-2.0
"""Unrolled, remat, scan, plain, over all four families: the same step, and another program.

Strategies on eight devices: `tests/parallel/strategies_test.py`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.config import loading, schema, validation
from localglobal_jax.parallel import context, placement
from localglobal_jax.training import optim
from localglobal_jax.training.step import init_state, make_update
from localglobal_jax.training.tasks import create_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RUNS = {
    "coatnet": (
        "coatnet_digits.py:size=tiny,data=mock",
        {"model.depths": "(3, 3)", "model.drop_path": "0.0"},
    ),
    "volo": (
        "volo_imagenet.py:size=tiny,data=mock",
        {
            "model.layout": "OS",
            "model.depths": "(3, 2)",
            "model.widths": "(24, 48)",
            "model.strides": "(1, 2)",
            "model.heads": "(2, 4)",
            "model.drop_path": "0.0",
        },
    ),
    "focal": (
        "focal_imagenet.py:size=tiny,data=mock",
        {
            "model.layout": "FF",
            "model.depths": "(2, 3)",
            "model.widths": "(16, 32)",
            "model.heads": "(2, 2)",
            "model.expand": "(2, 2)",
            "model.levels": "(2, 2)",
            "model.focal_windows": "(3, 1)",
            "model.drop_path": "0.0",
        },
    ),
    "muse": (
        "muse_wmt14.py:size=tiny,data=mock",
        {
            "model.depths": "(2, 2)",
            "model.dropout": "0.0",
            "model.attention_dropout": "0.0",
            "model.blocks": "{'M': {'kernel_dropout': 0.0}}",
            "data.buckets": "1",
            "dtype": "float32",
        },
    ),
}
BLOCKS = {  # every block of the models above: module paths, in the order of the computation
    "coatnet": [f"stage{i}/block{j}" for i in (1, 2) for j in (1, 2, 3)],
    "volo": [
        *(f"stage1/block{j}" for j in (1, 2, 3)),
        *(f"stage2/block{j}" for j in (1, 2)),
        *(f"head/block{j}" for j in (1, 2)),
    ],
    "focal": [
        *(f"stage1/block{j}" for j in (1, 2)),
        *(f"stage2/block{j}" for j in (1, 2, 3)),
    ],
    "muse": [f"{stack}/layer{j}" for stack in ("encoder", "decoder") for j in (1, 2)],
}
COMPILED = {"coatnet": 3, "volo": 3, "focal": 2, "muse": 2}  # blocks that are left with scan
FORMS = {
    "unrolled": {},
    "remat": {"remat": "blocks"},
    "scan": {"scan": True},
    "reference": {"implementation": "reference"},
}


@functools.cache
def task_of(model, drop=False):
    """(task, run, state); the state on the host, since steps take the one that they are given."""
    config, overrides = RUNS[model]
    rate = "model.dropout" if model == "muse" else "model.drop_path"
    overrides = {**overrides, "optim.accumulate": "1", **({rate: "0.3"} if drop else {})}
    run = validation.check(loading.load(str(CONFIGS / config), overrides))
    task = create_task(run)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    return task, run, jax.device_get(jax.jit(lambda: init_state(task, optimizer, run))())


@functools.cache
def lowered(model, form):
    """(lowered step, its arguments), on both devices."""
    task, run, state = task_of(model)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    partitioner = placement.Partitioner(schema.Parallel(**FORMS[form]))
    batch = partitioner.train_batch(next(task.train_batches(0, 1)))
    step = partitioner.compile_step(make_update(task, optimizer, run), state)
    return step.lower(partitioner.put(state), batch), (partitioner.put(state), batch)


@functools.cache
def step_of(model, form):
    """(state, metrics) after one batch."""
    program, arguments = lowered(model, form)
    return program.compile()(*arguments)


def text_of(model, form):
    return lowered(model, form)[0].as_text()


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize("model", RUNS)
def test_the_same_step(model, form):
    wanted, (sums, _) = step_of(model, "unrolled")
    found, (others, _) = step_of(model, form)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)  # checkpoints fit
    # The parameters show little: Adam's first update is the sign of the gradient. Its moments show
    # all of it.
    shown = [(x.optimizer, {**x.variables, "params": None}) for x in (found, wanted)]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(shown[0]), jax.tree.leaves(shown[1]), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 1e-4)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=1e-3 * scale, rtol=0, err_msg=name)
    np.testing.assert_allclose(sums["loss"][0], others["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(sums["gradient_norm"][0], others["gradient_norm"][0], rtol=1e-4)


@pytest.mark.parametrize("model", RUNS)
def test_remat_computes_every_block_again(model):
    """JAX puts one barrier before what the backward pass computes again of one block."""
    unrolled, remat = (text_of(model, form) for form in ("unrolled", "remat"))
    barriers = [text.count("stablehlo.optimization_barrier") for text in (unrolled, remat)]
    assert barriers[1] - barriers[0] == len(BLOCKS[model])


@pytest.mark.parametrize("model", RUNS)
def test_scan_is_one_program_for_equal_blocks(model):
    unrolled, scanned = (text_of(model, form) for form in ("unrolled", "scan"))
    assert scanned.count("stablehlo.dot_general") < unrolled.count("stablehlo.dot_general")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("model", RUNS)
def test_every_block_gathers_its_parameters_and_constrains_its_activations(model, scan):
    task, _, state = task_of(model)
    gathered, edges = [], []

    def gather(params):
        gathered.append(jax.tree.map(jnp.shape, params["params"]))
        return params

    def edge(x):
        edges.append(x.shape)
        return x

    batch = next(task.train_batches(0, 1))
    options = context.StackOptions(scan=scan, gather=gather)
    with context.tracing(edge=edge, options=options):
        jax.eval_shape(lambda v, b: task.loss(v, b, jax.random.key(0)), state.variables, batch)
    shapes = jax.tree.map(jnp.shape, state.variables["params"])
    blocks = [functools.reduce(dict.__getitem__, p.split("/"), shapes) for p in BLOCKS[model]]
    if scan:
        assert all(block in gathered for block in blocks)
        assert (len(gathered), len(edges)) == (COMPILED[model], 2 * COMPILED[model])
    else:
        assert gathered == blocks
        assert len(edges) == 2 * len(blocks)


@pytest.mark.parametrize("model", RUNS)
def test_scan_draws_other_blocks_to_drop_in_every_block(model):
    """The rates differ from block to block inside one loop; the loss stays a loss."""

    def loss_of(drop):
        task, _, state = task_of(model, drop)
        batch = next(task.train_batches(0, 1))
        with context.tracing(options=context.StackOptions(scan=True)):
            return jax.jit(task.loss)(state.variables, batch, jax.random.key(0)).metrics["loss"]

    (loss, weight), (same, _) = loss_of(True), loss_of(False)
    assert np.isfinite(loss) and weight > 0 and not np.isclose(loss, same, rtol=1e-6)
