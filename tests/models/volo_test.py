# SPDX-License-Identifier: Apache-2.0
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.mix_token import swap
from localglobal_jax.models import VOLO, create_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
REFERENCE = json.loads((GOLDEN / "volo_models.json").read_text())["models"]
TINY = {
    "classes": 5,
    "layout": "OS",
    "depths": (1, 1),
    "widths": (8, 12),
    "strides": (1, 2),
    "heads": (2, 3),
    "stem": 4,
    "class_blocks": 1,
}


def images(*size, batch=2):
    return jax.random.normal(jax.random.key(0), (batch, *size, 3))


@functools.cache
def tiny(size=(48, 64), **overrides):
    module = create_model("volo", **{**TINY, **overrides})
    return module, jax.jit(module.init)(jax.random.key(1), images(*size))


def apply(module, variables, x, key=None):
    """One training step's forward pass, or with key None, evaluation."""
    if key is None:
        return jax.jit(module.apply)(variables, x)
    run = lambda v, x, k: module.apply(  # noqa: E731
        v, x, train=True, rngs={"dropout": k}, mutable=["batch_stats"]
    )
    (logits, intermediates), state = jax.jit(run)(variables, x, jax.random.key(key))
    return logits, intermediates, state


@pytest.mark.parametrize("name", REFERENCE)
def test_parameters_equal_the_reference(name):
    module = create_model(name.rpartition("_")[0])
    size = REFERENCE[name]["input"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert count == REFERENCE[name]["n_params"]


@pytest.mark.parametrize("size", [(48, 64), (72, 40), (61, 75), (16, 16)])
def test_any_size_square_or_not_even_or_odd(size):
    module, variables = tiny(size)
    logits, intermediates = apply(module, variables, images(*size))
    stem = tuple((n + 1) // 2 // 4 for n in size)
    coarse = tuple(n // 2 for n in stem)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()
    assert {k: v.shape[1:] for k, v in intermediates.items()} == {
        "stem": (*stem, 8),
        "stage1": (*stem, 8),
        "stage2": (*coarse, 12),
        "features": (12,),
        "class_logits": (5,),
        "aux_logits": (*coarse, 5),
    }


@pytest.mark.parametrize(
    ("layout", "strides", "position"),
    [
        ("OCST", (1, 2, 1, 2), 2),
        ("TOOC", (2, 1, 2, 1), 4),
        (("OS", "CO", "S", "T"), (1, 1, 1, 1), 0),
    ],
)
def test_letters_strides_and_position_are_data(layout, strides, position):
    module = create_model(
        "volo",
        **{
            **TINY,
            "layout": layout,
            "depths": (2, 2, 1, 1),
            "widths": (8, 12, 12, 16),
            "strides": strides,
            "heads": (2, 3, 2, 4),
            "position": position,
        },
    )
    x = images(64, 96, batch=1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    logits, intermediates = jax.eval_shape(module.init_with_output, jax.random.key(0), x)[0]
    grids = module.grids((64, 96))
    assert logits.shape == (1, 5)
    assert ("position" in shapes) == bool(position)
    if position:
        assert shapes["position"].shape == (*grids[position], module.widths[position - 1])
    for i, (grid, width) in enumerate(zip(grids[1:], module.widths, strict=True), start=1):
        assert intermediates[f"stage{i}"].shape == (1, *grid, width)
    for i, stage in enumerate(module.stages(), start=1):
        changes = stage.stride > 1 or (i > 1 and stage.width != module.widths[i - 2])
        assert (f"downsample{i}" in shapes) == changes
        for j, letter in enumerate(stage.letters, start=1):
            has = {"C": "depthwise", "O": "outlook", "S": "attention", "T": "attention"}
            assert has[letter] in shapes[f"stage{i}"][f"block{j}"]


def test_options_of_a_letter_have_the_last_word():
    module, variables = tiny(blocks={"S": {"expansion": 5.0, "head_width": 4}}, expansion=(2.0, 3.0))
    stage1, stage2 = (variables["params"][f"stage{i}"]["block1"] for i in (1, 2))
    assert stage1["mlp"]["hidden"]["kernel"].shape == (8, 16)
    assert stage2["mlp"]["hidden"]["kernel"].shape == (12, 60)
    assert stage2["attention"]["qkv"]["kernel"].shape == (12, 3, 3, 4)


def test_logits_are_the_class_and_in_evaluation_half_the_best_token():
    module, variables = tiny()
    x = images(48, 64)
    logits, found = apply(module, variables, x)
    expected = found["class_logits"] + 0.5 * found["aux_logits"].max((1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    logits, found, _ = apply(module, variables, x, key=0)
    np.testing.assert_array_equal(logits, found["class_logits"])
    np.testing.assert_array_equal(found["mix_box"], 0)


def some_box(module, variables, x):
    """A key whose box is neither empty nor everything, and what training gives with it."""
    for key in range(20):
        logits, found, _ = apply(module, variables, x, key)
        top, left, bottom, right = found["mix_box"].tolist()
        if 0 < (bottom - top) * (right - left) < found["aux_logits"][0, ..., 0].size:
            return logits, found
    raise AssertionError("no box in 20 draws")


def test_mix_token_mixes_the_embedding_and_gives_the_tokens_their_logits_back():
    module, variables = tiny((80, 64), mix_token=True)
    plain, _ = tiny((80, 64))
    x = images(80, 64, batch=4)
    logits, found = some_box(module, variables, x)
    box = found["mix_box"]
    # What the network after the stem saw: tokens of 8 pixels, two to a token of the last grid.
    # Mixing images by the same box and mixing back the logits must give the same, up to the seam
    # of the stem's convolutions; so compare with a stem output mixed by hand instead.
    stem = swap(found["stem"], box, scale=2)
    bound = plain.bind(variables, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    assert bound.grids((80, 64))[0] == stem.shape[1:3]
    replaced = {"stem": lambda *_: stem}

    def intercept(call, args, kwargs, context):
        name = context.module.name
        return replaced[name]() if name in replaced else call(*args, **kwargs)

    with nn_intercept(intercept):
        (expected, seen), _ = plain.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(found["aux_logits"], swap(seen["aux_logits"], box), atol=1e-5)
    assert np.abs(swap(found["stem"], box, scale=2) - found["stem"]).max() > 0


def nn_intercept(interceptor):
    import flax.linen as nn

    return nn.intercept_methods(interceptor)


def test_gradients_reach_every_parameter_and_statistics_move():
    module, variables = tiny(mix_token=True, drop_path=0.1)
    x = images(48, 64, batch=4)

    def loss(params, key):
        (logits, found), state = module.apply(
            {**variables, "params": params},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return (logits**2).sum() + (found["aux_logits"] ** 2).sum(), state

    (_, state), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"], jax.random.key(3)
    )
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    before, after = variables["batch_stats"], state["batch_stats"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))


def test_outlookers_have_no_drop_path_yet_count_in_its_schedule():
    module, variables = tiny(depths=(2, 3), drop_path=1.0 - 1e-6)
    (_, found), state = module.apply(
        variables,
        images(48, 64),
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    blocks = state["intermediates"]["stage1"]
    assert all(blocks[f"block{j}"]["mlp_drop_path"]["__call__"][0].any() for j in (1, 2))
    last = state["intermediates"]["stage2"]["block3"]  # the only block at the full rate
    assert not last["mlp_drop_path"]["__call__"][0].any()
    del found


def test_another_size_needs_the_position_embedding_resized():
    module, variables = tiny((64, 64))
    with pytest.raises(ValueError, match=r"4x4 grid .* give 3x6 .* resize_position"):
        module.apply(variables, images(48, 96))
    larger = module.resize_position(variables, (48, 96))
    assert larger["params"]["position"].shape == (3, 6, 12)
    assert apply(module, larger, images(48, 96))[0].shape == (2, 5)
    ramp = {**variables, "params": {"position": jnp.arange(4.0)[:, None, None] * jnp.ones((4, 4, 12))}}
    resized = module.resize_position(ramp, (128, 64))["params"]["position"][:, 0, 0]
    np.testing.assert_allclose(resized, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    same = module.resize_position(ramp, (64, 64))["params"]["position"]
    np.testing.assert_array_equal(same, ramp["params"]["position"])


def test_half_precision_keeps_float32_parameters_and_logits():
    module, variables = tiny(dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, found = apply(module, variables, images(48, 64))
    assert logits.dtype == jnp.float32
    assert found["stage2"].dtype == jnp.bfloat16
    exact = tiny()[0].apply(variables, images(48, 64))[0]
    np.testing.assert_allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({"heads": (2,)}, (48, 64), "names 2 stages, but heads="),
        ({"expansion": (2.0, 3.0, 4.0)}, (48, 64), "names 2 stages, but expansion="),
        ({"heads": (3, 3)}, (48, 64), "width 8 is not divisible by heads=3"),
        ({"position": 3}, (48, 64), "position=3 is not one of the 2 stages"),
        ({"patch": 5}, (48, 64), "patch=5"),
        ({"blocks": {"O": {"windo": 5}}}, (48, 64), "windo"),
        ({}, (48, 12), "48x12 is smaller than the 16x16 pixels"),
    ],
)
def test_what_cannot_be_is_refused(overrides, size, message):
    module = VOLO(**{**TINY, **overrides})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
