# SPDX-License-Identifier: Apache-2.0
"""Least work of small functions, by hand: float32 unless said otherwise."""

import jax
import jax.numpy as jnp
import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import context
from localglobal_jax.profiling import abstract_task, perfect_fusion
from localglobal_jax.training import optim
from localglobal_jax.training.step import init_state

ROWS, IN, WIDTH, OUT = 8, 4, 16, 2
X = jnp.zeros((ROWS, IN))
W1, W2 = jnp.zeros((IN, WIDTH)), jnp.zeros((WIDTH, OUT))
FIRST, SECOND = ROWS * IN * WIDTH, ROWS * WIDTH * OUT  # multiply-adds of a product
HIDDEN = ROWS * WIDTH * 4  # bytes


def least(function, *args, examples=1):
    roles = ["parameter"] * (len(args) - examples) + ["example"] * examples
    return perfect_fusion.of_gradient(jax.make_jaxpr(function)(*args), roles)


def test_a_linear_product_keeps_nothing_but_its_input():
    found = least(lambda w, x: (x @ w).sum(), W1, X)
    assert found == perfect_fusion.Least(multiply_adds=2 * FIRST, kept=0)  # no gradient of x


@pytest.mark.parametrize(
    "activation", [jnp.tanh, jax.nn.relu, jax.nn.gelu, jnp.square, jax.nn.silu]
)
def test_an_activation_keeps_one_array(activation):
    """The result of the first product; what follows is computed again from it."""
    found = least(lambda w1, w2, x: (activation(x @ w1) @ w2).sum(), W1, W2, X)
    assert found.multiply_adds == 2 * FIRST + 3 * SECOND
    assert found.kept == HIDDEN


def test_the_narrowest_array_is_kept():
    """A sum of three branches, or a row's mean, before the function that needs it."""
    found = least(lambda a, b, c, x: jnp.tanh(x @ a + x @ b + x @ c).sum(), W1, W1, W1, X)
    assert found.kept == HIDDEN
    found = least(lambda w, x: jnp.tanh((x @ w).mean(1)).sum(), W1, X)
    assert found.kept == ROWS * 4
    half = jnp.bfloat16
    found = least(
        lambda w, v, x: (jnp.tanh((x @ w).astype(half)) @ v).sum(), W1, W2.astype(half), X
    )
    assert found.kept == HIDDEN / 2


def test_a_sign_is_a_bit():
    found = least(lambda w, x: jnp.maximum(x @ w, 0).sum(), W1, X)
    assert found.kept == ROWS * WIDTH / 8
    found = least(lambda w, x: jnp.where(x @ w > 0, x @ w, 0).sum(), W1, X)
    assert found.kept == ROWS * WIDTH / 8


def test_attention_weights_are_computed_again():
    def attention(q, k, v, x):
        q, k, v = x @ q, x @ k, x @ v
        return (jax.nn.softmax(q @ k.T) @ v).sum()

    found = least(attention, W1, W1, W1, X)
    assert found.kept == 3 * HIDDEN  # and not 8 x 8 weights
    logits = ROWS * WIDTH * ROWS
    assert found.multiply_adds == 3 * 2 * FIRST + 2 * 3 * logits


def test_a_convolution():
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def f(kernel, w, image):
        x = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (jnp.tanh(x) @ w).sum()

    found = least(f, kernel, jnp.zeros((5, 7)), image)
    positions = 2 * 4 * 4
    assert found.multiply_adds == positions * (2 * 27 * 5 + 3 * 5 * 7)
    assert found.kept == positions * 5 * 4


@pytest.mark.parametrize("unroll", [True, False])
def test_a_loop_counts_as_often_as_it_runs(unroll):
    w = jnp.zeros((WIDTH, WIDTH))

    def looped(w, x):
        if unroll:
            for _ in range(5):
                x = jnp.tanh(x @ w)
        else:
            x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)
        return x.sum()

    found = least(looped, w, jnp.zeros((ROWS, WIDTH)))
    assert found.kept == 5 * HIDDEN
    assert found.multiply_adds == (5 * 3 - 1) * ROWS * WIDTH * WIDTH


def test_dropout_and_recomputation_keep_nothing_more():
    def f(w1, w2, key, x):
        keep = jax.random.bernoulli(key, 0.5, (ROWS, WIDTH))
        return (jax.checkpoint(jnp.tanh)(jnp.where(keep, x @ w1, 0)) @ w2).sum()

    jaxpr = jax.make_jaxpr(f)(W1, W2, jax.random.key(0), X)
    roles = ["parameter", "parameter", "other", "example"]
    assert perfect_fusion.of_gradient(jaxpr, roles).kept == HIDDEN


@pytest.mark.parametrize(
    "spec",
    [
        "configs/coatnet_digits.py:size=tiny",
        "configs/muse_lohelp.py:size=tiny",
        "configs/volo_imagenet.py:data=mock,size=tiny",
        "configs/focal_imagenet.py:variant=tiny,data=mock,size=tiny",
    ],
)
def test_jax_keeps_more(spec):
    """The residuals of `jax.vjp`, but for the parameters and the batch, are no fewer bytes."""
    run = validation.check(loading.load(spec))
    task = abstract_task.create(run)
    batch, _ = abstract_task.batch(run, task, train=True)
    state = jax.eval_shape(
        lambda: init_state(task, optim.make_optimizer(run.optim, run.steps), run)
    )
    found = perfect_fusion.of_training(task, state.variables, batch)
    forward = perfect_fusion.of_evaluation(
        lambda variables, batch: task.loss(variables, batch, jax.random.key(0)).total,
        state.variables,
        batch,
    )
    assert 2 < found.multiply_adds / forward.multiply_adds <= 3 and not forward.kept
    freeze = tuple(name for name in state.variables["params"] if name.startswith(("stem", "enc")))
    frozen = perfect_fusion.of_training(task, state.variables, batch, freeze)
    assert forward.multiply_adds < frozen.multiply_adds < found.multiply_adds
    assert 0 < frozen.kept < found.kept

    def residuals(params, rest, batch):
        key = jax.random.key(0)
        loss = lambda params: task.loss({**rest, "params": params}, batch, key).total  # noqa: E731
        return jax.vjp(loss, params)[1]

    rest = dict(state.variables)
    params = rest.pop("params")
    with context.implementation("reference"):
        kept = jax.tree.leaves(jax.eval_shape(residuals, params, rest, batch))
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, batch)))
    assert 0 < found.kept < sum(x.size * x.dtype.itemsize for x in kept) + own
