# SPDX-License-Identifier: Apache-2.0
"""The step on a task so small that every number can be written down."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localglobal_jax.config import schema, validation
from localglobal_jax.training import divergence
from localglobal_jax.training.step import init_state, train_step
from localglobal_jax.training.tasks import Loss, Task


class Line(nn.Module):
    """Keeps a count of the examples seen, as BatchNorm keeps statistics."""

    @nn.compact
    def __call__(self, x, *, train=False):
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train:
            seen.value = seen.value + x.shape[0]
        return nn.Dense(1, name="dense")(x)[:, 0]


def loss(variables, batch, key):
    del key
    y, collections = Line().apply(variables, batch["x"], train=True, mutable=["batch_stats"])
    total = jnp.sum(batch["mask"] * (y - batch["y"]) ** 2)
    weight = jnp.sum(batch["mask"])
    return Loss(total, weight, {"loss": (total, weight)}, collections)


TASK = Task(
    model=Line(),
    model_spec={},
    inputs=(jax.ShapeDtypeStruct((1, 3), jnp.float32),),
    loss=loss,
    train_batches=lambda start, stop: iter(()),
    evaluators={},
    items="points",
    order="",
    summary="",
    use="",
)
RUN = validation.check({"model": {"name": "line"}, "optim": {"ema": 0.5}})


def batch(n=8):
    rng = np.random.default_rng(0)
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)[:n]
    return {
        "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=n), jnp.float32),
        "mask": jnp.asarray(mask),
    }


def step(state, batch, **options):
    return train_step(
        state,
        batch,
        task=TASK,
        optimizer=optax.sgd(0.1),
        options=schema.Optim(**options),
        seed=0,
    )


def test_one_step_of_gradient_descent_on_the_examples_that_count():
    state = init_state(TASK, optax.sgd(0.1), RUN)
    b = batch()
    after, (sums, finite) = step(state, b)
    params = state.variables["params"]["dense"]
    live = np.asarray(b["mask"]) > 0
    x, y = np.asarray(b["x"])[live], np.asarray(b["y"])[live]
    error = x @ np.asarray(params["kernel"])[:, 0] + np.asarray(params["bias"]) - y
    expected = np.asarray(params["kernel"])[:, 0] - 0.1 * 2 * (error @ x) / len(y)
    np.testing.assert_allclose(after.variables["params"]["dense"]["kernel"][:, 0], expected, 1e-5)
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], np.mean(error**2), 1e-5)
    assert after.step == 1 and finite.all()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_numbers_of_one_large_batch(parts):
    state = init_state(TASK, optax.sgd(0.1), RUN)
    whole, (sums, _) = step(state, batch())
    split, (split_sums, _) = step(state, batch(), accumulate=parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert split.variables["batch_stats"]["seen"] == 8
    np.testing.assert_allclose(sums["gradient_norm"], split_sums["gradient_norm"], rtol=1e-5)


def test_average_follows_all_variables():
    state = init_state(TASK, optax.sgd(0.1), RUN)
    after, _ = step(state, batch(), ema=0.5)
    old, new = state.variables["params"], after.variables["params"]
    rate = 1 - min(0.5, 1 / 10)  # the warm-up of the decay
    jax.tree.map(
        lambda a, o, n: np.testing.assert_allclose(a, o + rate * (n - o), rtol=1e-5),
        after.average["params"],
        old,
        new,
    )
    assert after.average["batch_stats"]["seen"] == pytest.approx(8 * rate)


def test_no_average_unless_asked_for():
    run = validation.check({"model": {"name": "line"}})
    assert init_state(TASK, optax.sgd(0.1), run).average == {}


def test_a_step_that_is_not_finite_is_told_and_if_allowed_changes_nothing():
    state = init_state(TASK, optax.sgd(0.1), RUN)
    bad = {**batch(), "x": batch()["x"].at[3, 0].set(jnp.inf)}
    after, outcome = step(state, bad)
    assert not jnp.isfinite(after.variables["params"]["dense"]["kernel"]).all()
    params = state.variables["params"]
    assert divergence.wrong(outcome.finite, params) == (True, ["dense/bias", "dense/kernel"])

    kept, (sums, finite) = step(state, bad, skip_nonfinite=1, ema=0.5)
    assert not finite[0] and kept.step == 1
    same = kept.replace(step=state.step)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert not any(np.any(x) for x in jax.tree.leaves(sums))
    fine = step(state, batch(), skip_nonfinite=1)[0], step(state, batch())[0]
    jax.tree.map(np.testing.assert_array_equal, *fine)
