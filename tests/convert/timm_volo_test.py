# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from localglobal_jax.convert import timm
from localglobal_jax.convert.timm import volo
from localglobal_jax.parallel import context

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
REFERENCE = json.loads((GOLDEN / "volo_models.json").read_text())["models"]


def fixture(name):
    kwargs = json.loads((GOLDEN / f"{name}.json").read_text())["kwargs"]
    return kwargs, load_file(GOLDEN / f"{name}.safetensors"), np.load(GOLDEN / f"{name}.npz")


def off(ours, theirs):
    """The largest difference, relative to the largest number; maps of channels are turned."""
    ours = np.asarray(ours)
    if theirs.ndim == ours.ndim == 4 and theirs.shape != ours.shape:
        theirs = theirs.transpose(0, 2, 3, 1)
    return np.abs(ours.reshape(theirs.shape) - theirs).max() / np.abs(theirs).max()


def in_their_words(found):
    """The outputs of our modules under the names of the reference's."""
    theirs = {
        "patch_embed.conv": np.maximum(found["stem/norm3"], 0),
        "patch_embed": found["stem"],
        "network.0.0.attn.v": found["stage1/block1/outlook/value"],
        "network.0.0.attn.attn": found["stage1/block1/outlook/weights"],
        "network.0.0.attn": found["stage1/block1/outlook"],
        "network.1.proj": found["downsample2"],
        "network.1": found["downsample2"],
        "norm": found["head/norm"],
    }
    for i, index in enumerate((0, 2, 3, 4), start=1):
        block = f"stage{i}/block1"
        theirs[f"network.{index}.0.norm1"] = found[f"{block}/norm"]
        theirs[f"network.{index}.0.mlp"] = found[f"{block}/mlp"]
        theirs[f"network.{index}.0"] = found[block]
        theirs[f"network.{index}"] = found[f"stage{i}"]
        if index:
            theirs[f"network.{index}.0.attn"] = found[f"{block}/attention"]
    tokens = found["stage4"].reshape(2, -1, found["stage4"].shape[-1])
    for i in (0, 1):
        block = f"head/block{i + 1}"
        theirs[f"post_network.{i}.attn"] = found[f"{block}/attention"]
        theirs[f"post_network.{i}.mlp"] = found[f"{block}/mlp"]
        theirs[f"post_network.{i}"] = np.concatenate([found[block], tokens], axis=1)
    return theirs


@pytest.mark.parametrize("name", ["volo_aux", "volo_noaux", "volo_odd_aux"])
def test_logits_and_everything_inside_equal_the_reference(name):
    kwargs, weights, golden = fixture(name)
    module, variables = timm.load("volo", weights, **kwargs)

    @jax.jit
    def run(variables, x):
        with context.implementation("reference"):  # fused, norms are no arrays of their own
            return module.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])

    x = jnp.asarray(golden["input"].transpose(0, 2, 3, 1))
    (logits, intermediates), state = run(variables, x)
    # The bounds asked for are 2e-5 and 1e-4; the reference's own rounding is up to 2e-6.
    assert off(logits, golden["output_f64"]) < 2e-6
    tuned, _ = jax.jit(module.apply)(variables, x)
    assert off(tuned, golden["output_f64"]) < 2e-6
    assert off(intermediates["class_logits"], golden["cls_logits"]) < 2e-6
    assert ("aux_logits" in intermediates) == ("aux_logits" in golden)
    if "aux_logits" in golden:
        assert off(intermediates["aux_logits"], golden["aux_logits"]) < 2e-6
    found = traverse_util.flatten_dict(state["intermediates"], sep="/")
    theirs = in_their_words({k.removesuffix("/__call__"): v[0] for k, v in found.items()})
    assert {f"mid/{key}" for key in theirs} == {key for key in golden if key.startswith("mid/")}
    for key, value in theirs.items():
        assert off(value, golden[f"mid/{key}"]) < 1e-5, key


@pytest.mark.parametrize("name", REFERENCE)
def test_names_and_shapes_of_every_published_model(name):
    module = volo.build({**volo.arguments(name), "num_classes": 1000})
    x = jnp.zeros((1, *REFERENCE[name]["input"], 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    ours = traverse_util.flatten_dict(variables)
    source = volo._source(module)
    found = {
        source(path, leaf.shape)[0]: list(volo._their_shape(path, leaf.shape))
        for path, leaf in ours.items()
    }
    listed = [*REFERENCE[name]["params"], *REFERENCE[name]["buffers"]]
    assert found == {key: shape for key, shape in listed if "num_batches" not in key}
    size = tuple(REFERENCE[name]["input"])
    base, arguments = timm.describe(module, variables, size)
    assert base == f"{name.rpartition('_')[0]}_224"
    assert arguments == ({} if size == (224, 224) else {"img_size": size})


@pytest.fixture(scope="module")
def small():
    kwargs, weights, _ = fixture("volo_aux")
    return kwargs, weights


def test_missing_and_left_over_names_are_listed(small):
    kwargs, weights = small
    changed = {**weights, "surplus.weight": np.zeros(3)}
    del changed["network.2.0.mlp.fc1.bias"], changed["pos_embed"]
    with pytest.raises(ValueError, match=r"surplus\.weight") as error:
        timm.load("volo", changed, **kwargs)
    for name in ("network.2.0.mlp.fc1.bias", "pos_embed"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"aux_head\.bias, aux_head\.weight$"):
        timm.load("volo", weights, **{**kwargs, "use_aux_head": False})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.weight", (11, 48)),
        ("network.2.0.attn.qkv.weight", (48, 144)),  # as many numbers, turned
        ("network.0.0.attn.attn.bias", (163,)),
        ("patch_embed.conv.3.weight", (16, 16, 1, 9)),
        ("cls_token", (1, 48, 1)),
    ],
)
def test_wrong_shapes_are_listed(small, name, shape):
    kwargs, weights = small
    with pytest.raises(ValueError, match=rf"{name} "):
        timm.load("volo", {**weights, name: np.zeros(shape, np.float32)}, **kwargs)
    with pytest.raises(ValueError, match=r"patch_embed\.conv\.0\.weight "):
        timm.load("volo", weights, **{**kwargs, "in_chans": 1})


def test_position_embedding_is_resized_for_another_image_size(small):
    kwargs, weights = small
    unchanged = timm.load("volo", weights, **{k: v for k, v in kwargs.items() if k != "img_size"})[
        1
    ]
    np.testing.assert_array_equal(unchanged["params"]["position"], weights["pos_embed"][0])
    module, variables = timm.load("volo", weights, **{**kwargs, "img_size": (96, 128)})
    assert variables["params"]["position"].shape == (6, 8, 48)
    shape = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    assert jax.eval_shape(module.apply, variables, shape)[0].shape == (1, 10)


def test_arguments_become_fields():
    kwargs = {
        "layers": [1, 2, 1],
        "embed_dims": [16, 24, 24],
        "num_heads": [2, 4, 6],
        "mlp_ratio": [2, 3.5, 4],
        "outlook_attention": [True, True, False],
        "downsamples": [False, False, False],
        "post_layers": None,
        "global_pool": "avg",
        "use_aux_head": False,
        "qkv_bias": True,
        "drop_path_rate": 0.1,
        "attn_drop_rate": 0.1,
    }
    module = volo.build(kwargs)
    assert (module.layout, module.strides, module.position) == ("OOS", (1, 1, 1), 3)
    assert (module.class_blocks, module.aux_head, module.drop_path) == (0, False, 0.1)
    assert module.expansion == (2, 3.5, 4)
    assert volo.build({**kwargs, "downsamples": [True, False, False]}).position == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lairs": 3}, r"\['lairs'\]"),
        ({"layers": None}, r"\['layers'\]"),
        ({"post_layers": ["sa"]}, "post_layers="),
        ({"post_layers": None}, 'global_pool="token" .*post_layers='),
        ({"global_pool": "avg"}, 'global_pool="avg"'),
        ({"downsamples": [False, True, False, False]}, "downsamples"),
    ],
)
def test_arguments_without_a_counterpart_are_refused(small, change, message):
    kwargs, weights = small
    with pytest.raises(ValueError, match=message):
        timm.load("volo", weights, **{**kwargs, **change})


def test_names_that_are_not_volo_are_refused():
    with pytest.raises(ValueError, match="volo_d1_224"):
        volo.arguments("volo_d6_224")
    assert volo.arguments("volo_d5_512.sail_in1k")["img_size"] == 512


@pytest.mark.parametrize("name", ["volo_aux", "volo_noaux", "volo_odd_aux"])
def test_the_state_dict_comes_back_bit_for_bit(name):
    kwargs, state, _ = fixture(name)
    found = timm.state_dict(*timm.load("volo", state, **kwargs))
    assert found.keys() == state.keys()
    for key, array in state.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert "num_batches" in key or found[key].tobytes() == array.tobytes(), key
