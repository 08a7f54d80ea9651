# SPDX-License-Identifier: Apache-2.0
"""Unrolled, remat, scan, plain: the same numbers, the same tree (more: `strategies_test.py`)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.config import loading, schema, validation
from localglobal_jax.parallel import placement as parallel
from localglobal_jax.training import optim
from localglobal_jax.training.step import init_state, make_update
from localglobal_jax.training.tasks import create_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RUNS = {
    "coatnet": (
        "coatnet_digits.py:size=tiny,data=mock",
        {"model.depths": "(3, 3)", "model.drop_path": "0.0"},
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
FORMS = {
    "unrolled": {},
    "remat": {"remat": "blocks"},
    "scan": {"scan": True},
    "reference": {"implementation": "reference"},
}


@functools.cache
def step_of(model, form, drop=False):
    """(compiled step, its state after one batch, metrics), on both devices."""
    config, overrides = RUNS[model]
    rate = {"coatnet": "model.drop_path", "muse": "model.dropout"}[model]
    overrides = {**overrides, "optim.accumulate": "1", **({rate: "0.3"} if drop else {})}
    run = validation.check(loading.load(str(CONFIGS / config), overrides))
    task = create_task(run)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    placement = parallel.Partitioner(schema.Parallel(**FORMS[form]))
    state = jax.jit(lambda: init_state(task, optimizer, run))()
    batch = placement.train_batch(next(task.train_batches(0, 1)))
    step = placement.compile_step(make_update(task, optimizer, run), jax.eval_shape(lambda: state))
    compiled = step.lower(placement.put(state), batch).compile()
    return compiled, *compiled(placement.put(state), batch)


@pytest.mark.parametrize("form", list(FORMS)[1:])
@pytest.mark.parametrize("model", RUNS)
def test_the_same_step(model, form):
    _, wanted, (sums, _) = step_of(model, "unrolled")
    _, found, (others, _) = step_of(model, form)
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
def test_scan_is_one_program_for_equal_blocks(model):
    unrolled, scanned = (step_of(model, form)[0].as_text() for form in ("unrolled", "scan"))
    assert scanned.count(" dot(") < unrolled.count(" dot(")


def test_scan_draws_other_blocks_to_drop_in_every_block():
    """The rates differ from block to block inside one loop; the loss stays a loss."""
    loss, weight = step_of("coatnet", "scan", drop=True)[2].metrics["loss"]
    same, _ = step_of("coatnet", "unrolled")[2].metrics["loss"]
    assert np.isfinite(loss) and weight > 0 and not np.isclose(loss, same, rtol=1e-6)
