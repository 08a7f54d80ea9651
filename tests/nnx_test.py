# SPDX-License-Identifier: Apache-2.0
"""Linen modules in NNX, through the bridge of flax: the recipes of localglobal_jax/README.md."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

import localglobal_jax as lg

IMAGES = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
LABELS = jnp.arange(4)
SMALL = dict(classes=4, depths=(1,), widths=(8,))
MODELS = {
    "coatnet": lg.create_model("coatnet", layout="C", stem=(8,), stem_stride=4, **SMALL),
    "volo": lg.create_model(
        "volo", layout="O", strides=(1,), heads=(1,), stem=8, class_blocks=0, aux_head=False,
        position=0, blocks={"O": {"head_width": 8}}, **SMALL,
    ),
    "focal": lg.create_model(
        "focal", layout="F", heads=(1,), window=2, expand=(1,), levels=(1,), focal_windows=(1,),
        image_size=16, **SMALL,
    ),
    "muse": lg.create_model(
        "muse", layout="SS", source_vocab=8, target_vocab=8, depths=(1, 1), widths=(8, 8),
        heads=(1, 1), hidden=(8, 8),
    ),
}  # fmt: skip
TOKENS = jnp.arange(2, 8).reshape(1, 6)
OPTIMIZER = optax.sgd(
    0.05, momentum=0.9
)  # Adam would amplify the rounding of gradients that are zero


def loss_of(logits):
    labels = TOKENS if logits.ndim == 3 else LABELS
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def inputs_of(family):
    return (TOKENS, TOKENS) if family == "muse" else (IMAGES,)


def to_nnx(module, inputs, variables=None):
    """The module in NNX, with the variables of linen if they are given."""
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(params=0, dropout=1))
    model.lazy_init(*inputs, train=False)
    for tree in (variables or {}).values():
        nnx.update(model, tree)
    return model


@nnx.jit
def nnx_step(model, optimizer, inputs):
    def loss(model):
        logits, _ = model(*inputs, train=True, mutable=["batch_stats"])
        return loss_of(logits)

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def linen_steps(module, variables, inputs, steps):
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def step(params, rest, moments):
        def loss(params):
            (logits, _), changed = module.apply(
                {"params": params, **rest}, *inputs, train=True, mutable=["batch_stats"]
            )
            return loss_of(logits), changed

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = OPTIMIZER.update(gradient, moments, params)
        return optax.apply_updates(params, updates), rest, moments, value

    moments, losses = OPTIMIZER.init(params), []
    for _ in range(steps):
        params, rest, moments, value = step(params, rest, moments)
        losses.append(float(value))
    return {"params": params, **rest}, losses


@nnx.jit
def predict(model):
    return model(IMAGES, train=False)[0]


def values(model, kind):
    """The variables of a kind as a flat dict of arrays, by their path."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, kind)), sep="/")


@pytest.mark.parametrize(
    "family",
    [*(f if f == "coatnet" else pytest.param(f, marks=pytest.mark.slow) for f in MODELS)],
)
def test_training_in_nnx_gives_the_parameters_of_linen(family):
    module, inputs = MODELS[family], inputs_of(family)
    variables = jax.jit(module.init)(jax.random.key(3), *inputs)
    model = to_nnx(module, inputs, variables)
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer, inputs)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    trained, expected = linen_steps(module, variables, inputs, 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for kind, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        found = values(model, kind)
        wanted = traverse_util.flatten_dict(trained.get(collection, {}), sep="/")
        assert found.keys() == wanted.keys()  # the same tree under the same names
        for path, value in wanted.items():
            np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)
    assert bool(values(model, nnx.BatchStat)) == (family in ("coatnet", "volo"))


def test_batch_norm_and_dropout():
    module = MODELS["coatnet"].clone(depths=(2,), drop_path=0.5)  # the first block drops nothing
    model = to_nnx(module, (IMAGES,))
    train = nnx.jit(lambda model: model(IMAGES, train=True, mutable=["batch_stats"])[0])

    before, initial = predict(model), values(model, nnx.BatchStat)
    first, second = train(model), train(model)
    assert not np.allclose(first, second)  # each call draws from the stream "dropout"
    moved = values(model, nnx.BatchStat)
    variances = [path for path in initial if path.endswith("var")]
    assert len(variances) == 6
    assert all(not np.allclose(moved[path], initial[path]) for path in variances)
    after = predict(model)
    assert not np.allclose(before, after)  # evaluation uses the running averages
    np.testing.assert_array_equal(predict(model), after)  # and neither draws nor changes them
    variables = {
        "params": traverse_util.unflatten_dict(values(model, nnx.Param), sep="/"),
        "batch_stats": traverse_util.unflatten_dict(moved, sep="/"),
    }
    np.testing.assert_allclose(after, module.apply(variables, IMAGES)[0], atol=1e-6)


def test_train_without_mutable_is_an_error():
    model = to_nnx(MODELS["coatnet"], (IMAGES,))
    with pytest.raises(Exception, match="batch_stats"):
        model(IMAGES, train=True)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_lazy_init_under_jit_does_not_reach_a_model_outside(jit):
    model = nnx.bridge.ToNNX(MODELS["coatnet"], rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError):
        jit(lambda x: model.lazy_init(x, train=False)(x)[0])(IMAGES)
    assert not values(model, nnx.Param)


def test_lazy_init_under_nnx_jit_on_its_argument_and_on_its_result():
    module = MODELS["coatnet"]
    made = nnx.jit(lambda: to_nnx(module, (IMAGES,)))()
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(params=0, dropout=1))
    nnx.jit(lambda model: model.lazy_init(IMAGES, train=False) and None)(model)
    found, same = values(made, nnx.Param), values(model, nnx.Param)
    assert found.keys() == same.keys() and len(found) > 10
    np.testing.assert_allclose(predict(made), predict(model), atol=1e-6)
