# SPDX-License-Identifier: Apache-2.0
"""The authors' Focal Transformer, number by number: fixtures of the original implementation."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import localglobal_jax as lg
from localglobal_jax.convert import adapt, files, focal
from localglobal_jax.inference import load
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.models.registry import create_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FIXTURES = ("focal_tiny", "focal_w4", "focal_useconv_pad")
MODELS = json.loads((GOLDEN / "focal_models.json").read_text())["models"]


@functools.cache
def fixture(name):
    kwargs = json.loads((GOLDEN / f"{name}.json").read_text())["kwargs"]
    return kwargs, load_file(GOLDEN / f"{name}.safetensors"), dict(np.load(GOLDEN / f"{name}.npz"))


def weights(kwargs, *, nearest=False):
    """A made-up state dict with the reference's names and shapes, without its buffers."""
    module = FocalTransformer(**focal.fields(kwargs, nearest=nearest))
    rng = np.random.default_rng(0)
    named = [focal.reference(*item) for item in focal.parameter_shapes(module, 3).items()]
    return {name: 0.2 * rng.normal(size=shape).astype(np.float32) for name, shape in named}


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_intermediates_equal_the_reference(name):
    kwargs, state, arrays = fixture(name)
    module, variables = focal.load(kwargs, state)
    x = jnp.asarray(arrays["input"].transpose(0, 2, 3, 1))
    run = jax.jit(
        lambda v, x: module.apply(v, x, capture_intermediates=True, mutable="intermediates")
    )
    (logits, mid), inner = run(variables, x)
    largest = np.abs(arrays["output"]).max()
    assert np.abs(logits - arrays["output"]).max() < 2e-5 * largest
    np.testing.assert_allclose(mid["features"], arrays["pooled_features"], atol=1e-4)
    checked = 0
    for key, expected in arrays.items():
        parts = key.removeprefix("mid/").split(".")
        if key == "mid/patch_embed":
            ours = mid["stem"]
        elif parts[-1] == "downsample":
            ours = inner["intermediates"][f"stage{int(parts[1]) + 2}"]["downsample"]["__call__"][0]
        elif parts[0] == "layers" and len(parts) == 4:
            stage, block = f"stage{int(parts[1]) + 1}", f"block{int(parts[3]) + 1}"
            ours = inner["intermediates"][stage][block]["__call__"][0]
        else:
            continue
        np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-4)
        checked += 1
    assert checked == 1 + sum(kwargs["depths"]) + len(kwargs["depths"]) - 1


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_the_published_models(name):
    spec = MODELS[name]
    ours = create_model(name.split("_patch4")[0])
    shapes = focal.parameter_shapes(ours, 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == spec["n_params"]
    expected = {name: tuple(shape) for name, shape in spec["params"]}
    assert dict(focal.reference(*item) for item in shapes.items()) == expected
    from_kwargs = FocalTransformer(**focal.fields(spec["kwargs"]))
    assert from_kwargs == ours.clone(drop_path=from_kwargs.drop_path)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 30.2), ("small", 51.5), ("base", 91.2)])
def test_fast_models_have_the_published_sizes(name, millions):
    shapes = focal.parameter_shapes(create_model(f"focalv2_{name}"), 3)
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 1) == millions


def test_missing_and_left_over_entries_are_listed():
    kwargs, state, _ = fixture("focal_w4")
    changed = {k: v for k, v in state.items() if k != "norm.weight"} | {"extra": np.zeros(2)}
    with pytest.raises(ValueError, match=r"\['norm.weight'\].*\['extra'\]"):
        focal.load(kwargs, changed)
    with pytest.raises(
        ValueError,
        match=r"head\.weight .*\(10, 127\).*\(10, 128\)",
    ):
        focal.load(kwargs, state | {"head.weight": state["head.weight"][:, 1:]})
    outside = {"layers.9.blocks.0.attn.relative_position_index": np.zeros((16, 16))}
    with pytest.raises(ValueError, match=r"\['layers\.9"):
        focal.load(kwargs, state | outside)


@pytest.mark.parametrize("buffer", ["relative_position_index", "valid_ind_rolled"])
def test_buffers_are_compared(buffer):
    kwargs, state, _ = fixture("focal_w4")
    name = f"layers.0.blocks.0.attn.{buffer}"
    with pytest.raises(ValueError, match="focal_windows"):
        focal.load(kwargs, state | {name: state[name] + 1})


def test_masks_of_shifted_windows_and_of_trimmed_surroundings_are_compared():
    kwargs = {**SMALL, "use_shift": True}
    state = weights(kwargs)
    # 16 x 16 in windows of 4, rolled by 2: what came round is apart from what did not
    rows = np.arange(16) >= 14
    region = np.stack(np.broadcast_arrays(rows[:, None], rows[None]), -1)
    tiles = region.reshape(4, 4, 4, 4, 2).swapaxes(1, 2).reshape(16, 16, 2)
    mask = np.where((tiles[:, :, None] != tiles[:, None]).any(-1), -100.0, 0.0)
    seen = np.zeros((5, 5))
    seen[1:, 1:] = 1
    buffers = {
        "layers.0.blocks.1.attn_mask": mask,
        "layers.0.blocks.1.attn.valid_ind_unfold_1": np.flatnonzero(seen),
    }
    focal.load(kwargs, state | buffers)
    for name, value in buffers.items():
        with pytest.raises(ValueError, match="focal_windows"):
            focal.load(kwargs, state | {name: value + 1})
        unshifted = name.replace("blocks.1", "blocks.0")
        if "mask" in name:
            with pytest.raises(ValueError, match=re.escape(unshifted)):
                focal.load(kwargs, state | {unshifted: value})


def test_buffers_may_be_absent():
    kwargs, state, _ = fixture("focal_w4")
    bare = {k: v for k, v in state.items() if "index" not in k and "valid_ind" not in k}
    assert len(bare) < len(state)
    _, variables = focal.load(kwargs, bare)
    _, complete = focal.load(kwargs, state)
    jax.tree.map(np.testing.assert_array_equal, variables, complete)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"embed_dims": 3}, '"embed_dims".*"embed_dim"'),
        ({"drop_rate": 0.1}, "drop_rate=0.1"),
        ({"focal_pool": "median"}, "focal_pool='median'"),
        ({"expand_layer": "first"}, "expand_layer='first'"),
    ],
)
def test_arguments_are_checked(kwargs, words):
    with pytest.raises(ValueError, match=words):
        focal.fields(kwargs)


SMALL = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "focal_levels": [3, 2],
    "focal_windows": [3, 1],
    "expand_sizes": [2, 1],
}
OPTIONS = {
    "shift": {"use_shift": True},
    "no expansion in even blocks": {"expand_layer": "even"},
    "pre-norm, position": {"use_pre_norm": True, "ape": True, "patch_norm": False},
    "conv pool": {"focal_pool": "conv"},
    "no pool": {"focal_pool": "none"},
    "pool in one stage": {"focal_stages": [1]},
    "level 0": {"focal_levels": [0, 1]},
    "no qkv bias, own scale": {"qkv_bias": False, "qk_scale": 0.3, "img_size": [64, 48]},
    "headless": {"num_classes": 0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_maps_both_ways(option):
    kwargs = {**SMALL, **OPTIONS[option]}
    module, variables = focal.load(kwargs, weights(kwargs))
    y, _ = jax.jit(module.apply)(variables, jnp.ones((1, 64, 48, 3)))
    assert y.shape == (1, kwargs["num_classes"] or 16) and bool(jnp.isfinite(y).all())
    block = variables["params"]["stage1"]["block1"]["attention"]
    assert ("neighbour_bias" in block) == (option not in {"no expansion in even blocks", "level 0"})
    assert ("pool2" in block) == (option not in {"no pool", "pool in one stage", "level 0"})


def test_another_resolution():
    """Nothing has to change to run elsewhere; chosen anew, windows bring resized tables."""
    kwargs, state, _ = fixture("focal_w4")
    module, variables = focal.load(kwargs, state)
    logits, _ = jax.jit(module.apply)(variables, jnp.ones((1, 96, 72, 3)))
    assert bool(jnp.isfinite(logits).all())
    larger, resized = focal.load(kwargs, state, image_size=(128, 96))
    old, new = (v["params"]["stage4"]["block1"]["attention"] for v in (variables, resized))
    assert old["window_bias"].shape == (3, 3, 8) and new["window_bias"].shape == (5, 5, 8)
    np.testing.assert_allclose(new["window_bias"][2, 2], old["window_bias"][1, 1], rtol=1e-6)
    np.testing.assert_allclose(new["pool1"]["kernel"].sum(), old["pool1"]["kernel"].sum(), 1e-5)
    gained = resized["params"]["stage3"]["block1"]["attention"]
    assert "neighbour_bias" not in variables["params"]["stage3"]["block1"]["attention"]
    assert not gained["neighbour_bias"].any()
    logits, _ = jax.jit(larger.apply)(resized, jnp.ones((1, 128, 96, 3)))
    assert bool(jnp.isfinite(logits).all())
    same, unchanged = focal.load(kwargs, state, image_size=64)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables)


def test_another_number_of_classes_starts_from_zero():
    kwargs, state, arrays = fixture("focal_w4")
    module, variables = focal.load(kwargs, state, classes=3)
    x = jnp.asarray(arrays["input"].transpose(0, 2, 3, 1))
    logits, mid = jax.jit(module.apply)(variables, x)
    np.testing.assert_array_equal(logits, np.zeros((2, 3)))
    np.testing.assert_allclose(mid["features"], arrays["pooled_features"], atol=1e-4)
    with pytest.raises(ValueError, match='"class"'):
        focal.load(kwargs, state, **{"class": 3})
    with pytest.raises(ValueError, match="overrides"):
        focal.load(kwargs, state, layer_scale=1e-4)
    with pytest.raises(ValueError, match="overrides"):
        focal.load(kwargs, state, qkv_bias=False)
    headless, variables = focal.load(kwargs, state, classes=0)
    assert "classifier" not in variables["params"]["head"] and headless.classes == 0


# ---------------------------------------------------------------------------- the fast models

FAST = {**SMALL, "focal_levels": [2, 2], "focal_topK": 21, "use_conv_embed": True, "img_size": 48}


def choices():
    """The name of the first layer's keys, the keys that we choose, and others equally far away."""
    grid = np.stack(np.meshgrid(range(12), range(12), indexing="ij"), -1).reshape(-1, 2)
    centres = grid.reshape(12, 12, 2)[2::4, 2::4].reshape(-1, 2)
    distance = ((centres[:, None] - grid) ** 2).sum(-1)
    ours = np.argsort(distance, 1, kind="stable")[:, :21]
    other = 143 - np.argsort(distance[:, ::-1], 1, kind="stable")[:, :21]
    return "layers.0.blocks.0.attn.topk_cloest_indice_0", ours, other


def test_a_fast_model_with_a_choice_of_its_own_is_classified_with_and_fine_tuned(tmp_path, caplog):
    prefix, _, other = choices()
    save_file(weights(FAST, nearest=True) | {prefix: other}, tmp_path / "fast.safetensors")
    own = {"data.mean": "(0.5, 0.5, 0.5)", "data.std": "(0.5, 0.5, 0.5)"}
    place = str(tmp_path / "out")
    files.convert_file(
        "focal", str(tmp_path / "fast.safetensors"), place, name="focalv2", arguments=FAST,
        overrides=own,
    )  # fmt: skip
    module, variables = lg.load(place)
    assert "nearest" in variables
    Image.new("RGB", (48, 48)).save(tmp_path / "black.png")
    (found,) = lg.load_classifier(place).classify([str(tmp_path / "black.png")])
    assert len(found.best) > 0
    shape = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    with caplog.at_level("INFO"):
        begun = load.pretrained(place, module, (shape,))
    assert set(begun) == {"params"} and "equally near keys" in caplog.text


def test_fast_models_keep_their_choice_among_equally_near_keys():
    state = weights(FAST, nearest=True)
    module, variables = focal.load(FAST, state)
    assert module.nearest == 21 and "nearest" not in variables
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 48, 48, 3)), jnp.float32)
    plain, _ = jax.jit(module.apply)(variables, x)

    prefix, ours, other = choices()
    assert (np.sort(ours) != np.sort(other)).any()  # other keys, equally far away
    _, same = focal.load(FAST, state | {prefix: ours})
    assert "nearest" not in same
    module, kept = focal.load(FAST, state | {prefix: other})
    assert kept["nearest"]["stage1"]["block1"]["attention"]["window_index"].shape == (9, 21)
    changed, _ = jax.jit(module.apply)(kept, x)
    assert float(jnp.abs(changed - plain).max()) > 1e-6
    elsewhere, _ = jax.jit(module.apply)(kept, x[:, :, :40])  # another map: chosen anew
    assert bool(jnp.isfinite(elsewhere).all())
    with pytest.raises(ValueError, match="focal_windows"):
        focal.load(FAST, state | {prefix: ours + 1})
    chosen, _ = jax.jit(module.apply)(adapt.resize(module, kept, (48, 48)), x)
    np.testing.assert_array_equal(chosen, changed)
    wide = jnp.pad(x, ((0, 0), (0, 0), (0, 16), (0, 0)))
    chosen, _ = jax.jit(module.apply)(adapt.resize(module, kept, (48, 64)), wide)
    assert bool(jnp.isfinite(chosen).all())
