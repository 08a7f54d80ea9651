# SPDX-License-Identifier: Apache-2.0
"""The Focal Transformer as a model: any size, any letters, one training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.models.registry import create_model
from localglobal_jax.models.stems import PatchEmbed

SMALL = dict(
    classes=4,
    depths=(1, 2),
    widths=(8, 16),
    heads=(2, 2),
    window=4,
    expand=(2, 1),
    levels=(2, 2),
    focal_windows=(3, 1),
    image_size=32,
    layout="FF",
    expansion=2.0,
)


def made_up(module, x):
    """Variables without running the model once: norms as they start, everything else noise."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        name = path[-1].key
        if name in {"scale", "var"}:
            return jnp.ones(leaf.shape)
        noise = rng.normal(size=leaf.shape) * 0.2
        return jnp.zeros(leaf.shape) if name == "mean" else jnp.asarray(noise, jnp.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(value, shapes)


def test_parameters_serve_every_image_size():
    module = FocalTransformer(**SMALL)
    variables = made_up(module, jnp.ones((1, 32, 32, 3)))
    for size in ((37, 50), (8, 64)):
        logits, mid = jax.jit(module.apply)(variables, jnp.ones((2, *size, 3)))
        assert logits.shape == (2, 4)
        assert mid["stage1"].shape == (2, size[0] // 4, size[1] // 4, 8)
        assert mid["stage2"].shape == (2, size[0] // 8, size[1] // 8, 16)
        assert mid["features"].shape == (2, 16)


def test_windows_follow_image_size():
    """A grid that the window fills has one window and no neighbours (4x4 in the second stage)."""

    def shapes(**fields):
        module = FocalTransformer(**{**SMALL, **fields})
        tree = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
        return [tree[f"stage{i}"]["block1"]["attention"] for i in (1, 2)]

    first, second = shapes()
    assert "neighbour_bias" in first and "neighbour_bias" not in second
    first, second = shapes(image_size=(24, 16))
    assert first["window_bias"].shape == (7, 7, 2)
    assert second["window_bias"].shape == (3, 3, 2)


def test_shift_and_expansion_alternate():
    module = FocalTransformer(**SMALL, shift=True, expand_except="odd")
    fields = [module.block_options(0, i)["F"] for i in range(3)]
    assert [f["shift"] for f in fields] == [0, 2, 0]
    assert [f["expand"] for f in fields] == [2, 0, 2]


@pytest.mark.parametrize(
    ("fields", "size", "words"),
    [
        ({"heads": (2,)}, 32, r"heads=\(2,\)"),
        ({"heads": (2, 3)}, 32, "width 16 .*3 heads"),
        ({"conv_embed": True, "patch": 2}, 32, "patch=4"),
        ({}, 7, "8x8"),
        ({"layout": "FQ"}, 32, '"FQ"'),
        ({"blocks": {"F": {"focal_windows": 3}}}, 32, '"focal_windows".*"focal_window"'),
    ],
)
def test_errors_say_what_is_allowed(fields, size, words):
    module = FocalTransformer(**{**SMALL, **fields})
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, size, size, 3)))


LETTERS = {
    "coatnet CAET": ("coatnet", {"layout": "CAET"}),
    "coatnet CMMT": ("coatnet", {"layout": "CMMT"}),
    "coatnet CFAS": ("coatnet", {"layout": "CFAS"}),
    "focal FMAE": ("focal", {"layout": "FMAE"}),
    "focal fast": ("focal", {"layout": "FFFF", "nearest": 9}),
    "focal CFST": ("focal", {"layout": "CFST", "layer_scale": 0.1, "shift": True}),
}


@pytest.mark.parametrize("case", LETTERS)
def test_letters_drop_in_and_a_step_lowers_the_loss(case):
    name, fields = LETTERS[case]
    shape = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "classes": 3, "drop_path": 0.1}
    if name == "coatnet":
        blocks = {letter: {"head_width": 8} for letter in "AEFMST"}
        blocks["A"]["window"], blocks["M"]["windows"], blocks["F"]["window"] = 3, (3,), 2
        blocks["F"]["expand"] = 1
        shape |= {"stem": (4, 8), "head_hidden": 0, "blocks": blocks}
    else:
        shape |= {"heads": (1, 1, 2, 2), "window": 2, "expand": (1,) * 4, "image_size": 64}
        shape |= {"focal_windows": (3, 3, 1, 1)}
        shape |= {"blocks": {"A": {"window": 3}, "M": {"windows": (3,)}}}
    module = create_model(name, **{**shape, **fields})
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64, 64, 3)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 1])
    variables = made_up(module, x)

    def loss(params):
        (logits, _), _ = module.apply(
            {**variables, "params": params},
            x,
            train=True,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(variables["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    after, _ = step(jax.tree.map(lambda p, g: p - 0.02 * g / norm, variables["params"], grads))
    assert float(after) < float(before)


def test_bfloat16_activations_float32_parameters():
    module = FocalTransformer(**SMALL, dtype="bfloat16")
    x = jnp.ones((1, 32, 32, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, mid = jax.eval_shape(module.apply, variables, x)
    assert logits.dtype == jnp.float32 and mid["stage2"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (7, 4, 2)])
def test_patch_embed_norms_all_of_an_example_then_every_position(kernel, stride, padding):
    module = PatchEmbed(6, kernel, stride, padding, pre_norm=True)
    x = 3.0 + jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 12, 4)), jnp.float32)
    variables = made_up(module, x)
    params = variables["params"]
    normed = (x - x.mean((1, 2, 3), keepdims=True)) / jnp.sqrt(
        x.var((1, 2, 3), keepdims=True) + 1e-5
    )
    padded = jnp.pad(
        normed + params["pre_norm"]["bias"][None, None, None],
        ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    )
    y = module.apply(variables, x)
    corner = jnp.einsum("byxc,yxcd->bd", padded[:, :kernel, :kernel], params["conv"]["kernel"])
    corner = corner + params["conv"]["bias"][None]
    mean, var = corner.mean(-1, keepdims=True), corner.var(-1, keepdims=True)
    expected = (corner - mean) / jnp.sqrt(var + 1e-5) + params["norm"]["bias"][None]
    np.testing.assert_allclose(y[:, 0, 0], expected, atol=1e-4)
    assert y.shape[1:3] == tuple((n + 2 * padding - kernel) // stride + 1 for n in (9, 12))
