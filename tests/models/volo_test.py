# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.convert import adapt
from localglobal_jax.models import VOLO, stems
from localglobal_jax.models.mix_token import swap
from localglobal_jax.models.registry import create_model

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
FOUR = {**TINY, "depths": (2, 2, 1, 1), "widths": (8, 12, 12, 16), "heads": (2, 3, 2, 4)}


def images(*size, batch=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(batch, *size, 3)), jnp.float32)


def shapes_of(module, *size):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def tiny(*size, **overrides):
    """A small VOLO with random weights: drawn by numpy, which compiles nothing."""
    module = create_model("volo", **{**TINY, **overrides})
    rng = np.random.default_rng(1)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape) * a.size**-0.3, a.dtype)  # noqa: E731
    variables = jax.tree.map(draw, shapes_of(module, *size))
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return module, variables


def training(module):
    """The forward pass of a training step: (variables, images, key) -> (output, statistics)."""

    @jax.jit
    def run(variables, x, key):
        return module.apply(
            variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )

    return run


@pytest.mark.parametrize("name", REFERENCE)
def test_parameters_equal_the_reference(name):
    module = create_model(name.rpartition("_")[0])
    shapes = shapes_of(module, *REFERENCE[name]["input"])
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == REFERENCE[name]["n_params"]


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_grid_of_the_stem_is_known_before_it_runs(patch):
    module = stems.ConvPatchStem(4, 6, patch=patch)
    for size in ((16, 17), (18, 23), (30, 31), (32, 15)):
        image = jax.ShapeDtypeStruct((1, *size, 3), "float32")
        y, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
        assert y.shape[1:3] == stems.patch_grid(size, patch)


@pytest.mark.parametrize("size", [(48, 64), (72, 40), (61, 75), (16, 16)])
def test_any_size_square_or_not_even_or_odd(size):
    module = VOLO(**TINY)
    logits, intermediates = jax.eval_shape(
        module.init_with_output, jax.random.key(0), jnp.zeros((2, *size, 3))
    )[0]
    stem = tuple((n + 1) // 2 // 4 for n in size)
    coarse = tuple(n // 2 for n in stem)
    assert logits.shape == (2, 5)
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
        "volo", **{**FOUR, "layout": layout, "strides": strides, "position": position}
    )
    (logits, intermediates), shapes = jax.eval_shape(
        module.init_with_output, jax.random.key(0), jnp.zeros((1, 64, 96, 3))
    )
    shapes, grids = shapes["params"], module.grids((64, 96))
    assert logits.shape == (1, 5)
    assert ("position" in shapes) == bool(position)
    if position:
        assert shapes["position"].shape == (*grids[position], module.widths[position - 1])
    has = {"C": "depthwise", "O": "outlook", "S": "attention", "T": "attention"}
    for i, (stage, grid) in enumerate(zip(module.stages(), grids[1:], strict=True), start=1):
        assert intermediates[f"stage{i}"].shape == (1, *grid, stage.width)
        changes = stage.stride > 1 or (i > 1 and stage.width != module.widths[i - 2])
        assert (f"downsample{i}" in shapes) == changes
        for j, letter in enumerate(stage.letters, start=1):
            assert has[letter] in shapes[f"stage{i}"][f"block{j}"]


def test_options_of_a_letter_have_the_last_word():
    options = {"S": {"expansion": 5.0, "head_width": 4}}
    module = create_model("volo", **{**TINY, "blocks": options, "expansion": (2.0, 3.0)})
    params = shapes_of(module, 32, 32)["params"]
    stage1, stage2 = (params[f"stage{i}"]["block1"] for i in (1, 2))
    assert stage1["mlp"]["hidden"]["kernel"].shape == (8, 16)
    assert stage2["mlp"]["hidden"]["kernel"].shape == (12, 60)
    assert stage2["attention"]["qkv"]["kernel"].shape == (12, 3, 3, 4)


def test_an_outlooker_can_stride_and_widen_like_any_block():
    module = create_model(
        "coatnet",
        classes=5,
        layout="CO",
        depths=(1, 2),
        widths=(8, 12),
        stem=(4, 4),
        blocks={"O": {"head_width": 4, "window": 5}},
    )
    shape = jax.ShapeDtypeStruct((1, 24, 16, 3), jnp.float32)
    (_, found), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), shape)
    assert found["stage2"].shape == (1, 3, 2, 12)
    weights = variables["params"]["stage2"]["block2"]["outlook"]["weights"]["kernel"]
    assert weights.shape == (12, 3, 25, 25)


def test_logits_are_the_class_and_in_evaluation_half_the_best_token():
    module, variables = tiny(48, 64)
    logits, found = jax.jit(module.apply)(variables, images(48, 64))
    expected = found["class_logits"] + 0.5 * found["aux_logits"].max((1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    (logits, found), _ = training(module)(variables, images(48, 64), jax.random.key(0))
    np.testing.assert_array_equal(logits, found["class_logits"])
    np.testing.assert_array_equal(found["mix_box"], 0)


def test_mix_token_mixes_embedded_tokens_and_gives_each_image_its_logits_back():
    module, variables = tiny(80, 72, mix_token=True)
    x, run = images(80, 72, batch=3), training(module)
    for key in range(20):  # until the box is neither nothing nor everything
        (logits, found), _ = run(variables, x, jax.random.key(key))
        top, left, bottom, right = found["mix_box"].tolist()
        if 0 < (bottom - top) * (right - left) < 20:
            break
    # The same network with a stem whose output is mixed by hand: one token of the last grid is
    # two of the stem's in each direction, and the ninth column of the stem never takes part.
    box, mixed = found["mix_box"], np.array(found["stem"])
    inside = np.s_[:, 2 * top : 2 * bottom, 2 * left : 2 * right]
    mixed[inside] = np.array(found["stem"])[::-1][inside]
    assert (mixed != found["stem"]).any()

    def replace_stem(call, args, kwargs, context):
        return jnp.asarray(mixed) if context.module.name == "stem" else call(*args, **kwargs)

    with nn.intercept_methods(replace_stem):
        (expected, seen), _ = training(VOLO(**TINY))(variables, x, jax.random.key(0))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(found["aux_logits"], swap(seen["aux_logits"], box), atol=1e-5)


def test_gradients_reach_every_parameter_and_statistics_move():
    module, variables = tiny(48, 64, mix_token=True, drop_path=0.1)
    run, x = training(module), images(48, 64)

    @jax.jit
    @jax.grad
    def gradient(params):
        (logits, found), _ = run({**variables, "params": params}, x, jax.random.key(3))
        return (logits**2).sum() + (found["aux_logits"] ** 2).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    _, state = run(variables, x, jax.random.key(3))
    moved = jax.tree.map(
        lambda a, b: (a != b).any(), variables["batch_stats"], state["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


def test_outlookers_have_no_drop_path_yet_count_in_its_schedule():
    seen = {}

    def record(call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            seen["/".join(context.module.path)] = context.module.rate
        return call(*args, **kwargs)

    fields = {**FOUR, "layout": "OSOC", "strides": (1, 2, 1, 1), "drop_path": 0.5}
    with nn.intercept_methods(record):
        shapes_of(create_model("volo", **fields), 64, 64)
    rates = {path.rpartition("/")[0]: rate for path, rate in seen.items()}
    assert rates == pytest.approx(
        {
            "stage1/block1": 0.0,
            "stage1/block2": 0.0,
            "stage2/block1": 0.2,
            "stage2/block2": 0.3,
            "stage3/block1": 0.0,
            "stage4/block1": 0.5,
        }
    )


def test_another_size_needs_the_position_embedding_resized():
    module, variables = tiny(64, 64)
    x = jnp.zeros((1, 48, 96, 3))
    with pytest.raises(ValueError, match=r"4x4.*3x6.*convert\.adapt\.resize"):
        jax.eval_shape(module.apply, variables, x)
    larger = adapt.resize(module, variables, (48, 96))
    assert larger["params"]["position"].shape == (3, 6, 12)
    assert jax.eval_shape(module.apply, larger, x)[0].shape == (1, 5)


def test_half_precision_keeps_float32_parameters_and_logits():
    module = VOLO(**TINY, dtype="bfloat16")
    x = jnp.zeros((1, 48, 64, 3))
    (logits, found), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == found["aux_logits"].dtype == jnp.float32
    assert found["stage1"].dtype == found["stage2"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({"heads": (2,)}, (48, 64), r"heads=\(2,\)"),
        ({"expansion": (2.0, 3.0, 4.0)}, (48, 64), "expansion="),
        ({"heads": (3, 3)}, (48, 64), "width 8 .*heads=3"),
        ({"position": 3}, (48, 64), "position=3"),
        ({"patch": 5}, (48, 64), "patch=5"),
        ({"blocks": {"O": {"windo": 5}}}, (48, 64), "windo"),
        ({}, (48, 12), "48x12.*16x16"),
    ],
)
def test_what_cannot_be_is_refused(overrides, size, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(VOLO(**{**TINY, **overrides}), *size)
