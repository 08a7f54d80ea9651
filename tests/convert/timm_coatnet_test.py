# SPDX-License-Identifier: Apache-2.0
"""CoAtNet equals timm's: recorded numbers of every family, names of every model, strictness."""

import gzip
import json
import pathlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.blocks.layers import ACTIVATIONS, pool
from localglobal_jax.convert import timm, weights
from localglobal_jax.convert.timm import coatnet
from localglobal_jax.models import FocalTransformer
from localglobal_jax.parallel import context

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FIXTURES = ["coatnet_0", "coatnet_0_rw", "coatnet_bn_0_rw", "coatnet_nano_rw", "coatnet_rmlp_2_rw"]
MODELS = json.loads(gzip.decompress((GOLDEN / "coatnet_models.json.gz").read_bytes()))


def fixture(name):
    """Configuration, state dict, recorded arrays."""
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    state = weights.read_safetensors(GOLDEN / f"{name}.safetensors")
    return config, dict(state), dict(np.load(GOLDEN / f"{name}.npz"))


def converted(config, state):
    return timm.load(config["cfg"], state, **config["model_kwargs"])


@partial(jax.jit, static_argnums=0)
def logits_of(module, variables, x):
    return module.apply(variables, x, train=False)[0]


@partial(jax.jit, static_argnums=0)
def all_of(module, variables, x):
    with context.implementation("reference"):  # fused, norms are no arrays of their own
        return module.apply(
            variables, x, train=False, capture_intermediates=True, mutable=["intermediates"]
        )


def image(arrays, dtype="float32"):
    return jnp.asarray(np.moveaxis(arrays["input"], 1, -1), dtype)


def inside(module, variables, arrays):
    """Logits, and the output of every submodule by its path."""
    (logits, _), inner = all_of(module, variables, image(arrays))
    outputs = {}
    for path, leaf in jax.tree.leaves_with_path(inner["intermediates"]):
        keys = [key.key for key in path if hasattr(key, "key")]
        if keys[-1] == "__call__":  # attention shows its weights, too
            outputs["/".join(keys[:-1])] = leaf
    return logits, outputs


def error(ours, theirs):
    """Largest difference, relative to the largest value of the reference."""
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


# How a recorded module is called here: our submodule, and what the record has beyond it.
INNER = {
    "C": {
        "shortcut": "shortcut",
        "pre_norm": "norm",
        "conv1_1x1": "expand",
        "norm1": "expand_norm",
        "conv2_kxk": "depthwise",
        "se": "squeeze_excite",
        "se_early": "squeeze_excite",
        "norm2": "depthwise_norm",
        "conv3_1x1": "project",
    },
    "T": {
        "shortcut": "shortcut",
        "norm1": "norm",
        "attn": "attention",
        "norm2": "mlp_norm",
        "mlp": "mlp",
    },
}


def ours(name, module, outputs):
    """Our value for the record `name` (channels last), or None where we have no such place."""
    kind, _, name = name.partition("/")
    if name == "stem":
        return outputs["stem"]
    if name == "head.pre_logits":
        return jnp.tanh(outputs["head/hidden"])
    if not name.startswith("stages"):
        return None
    _, stage, _, block, *inner = name.split(".")
    stage, block = int(stage), int(block)
    path = f"stage{stage + 1}/block{block + 1}"
    letter = module.stages()[stage].letters[block]
    options = module.blocks[letter]
    if kind == "relpos_bias":
        return outputs[f"{path}/attention/relative_bias"][None]
    if not inner:
        return outputs[path]
    if inner[0] not in INNER[letter]:  # "down": a pooling that is no module here
        return None
    value = outputs[f"{path}/{INNER[letter][inner[0]]}"]
    if letter == "T" and inner[0] == "norm1" and block == 0:
        return pool(value, options["pool"])
    if (
        letter == "C"
        and "norm" in inner[0]
        and (inner[0] != "pre_norm" or options["pre_activation"])
    ):
        return ACTIVATIONS[options["activation"]](value)
    return value


@pytest.mark.parametrize("name", FIXTURES)
def test_equals_timm(name):
    config, state, arrays = fixture(name)
    module, variables = converted(config, state)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == config["n_params"]
    logits, outputs = inside(module, variables, arrays)
    assert error(logits, arrays["output_f64"]) < 2e-6
    tuned = logits_of(module, variables, image(arrays))
    assert error(tuned, arrays["output_f64"]) < 2e-6
    compared = set()
    for key, theirs in arrays.items():
        value = ours(key, module, outputs) if "/" in key else None
        if value is None:
            continue
        if value.ndim == 4 and key.startswith("mid"):
            value = jnp.moveaxis(value, -1, 1)
        assert error(value[: len(theirs)], theirs) < 1e-5, key
        compared.add(key)
    blocks = {key for key in arrays if key.count(".") == 3 and key.startswith("mid/stages")}
    assert blocks <= compared and len(compared) > 2 * len(blocks)


@pytest.mark.parametrize("name", FIXTURES)
def test_equals_timm_in_float64(name):
    config, state, arrays = fixture(name)
    module, variables = converted(config, state)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), variables)
        logits = logits_of(module.clone(dtype="float64"), variables, image(arrays, "float64"))
    assert error(logits, arrays["output_f64"]) < 1e-13


# ---------------------------------------------------------------------------- the check can fail


def _swap_query_key(variables):
    def swap(path, leaf):
        if path[-2].key != "qkv":
            return leaf
        axis = leaf.ndim - 3
        return jnp.take(leaf, jnp.array([1, 0, 2]), axis)

    return jax.tree.map_with_path(swap, variables)


def _leaf(change, *ends):
    """Changes the leaves whose path ends so."""

    def wrong(variables):
        return jax.tree.map_with_path(
            lambda path, leaf: change(leaf) if path[-1].key in ends else leaf, variables
        )

    return wrong


MUTATIONS = {
    "key for query": ("coatnet_0", _swap_query_key, {}),
    "displacements reversed": ("coatnet_0", _leaf(lambda x: x[::-1, ::-1], "table"), {}),
    "heights for widths": ("coatnet_0", _leaf(lambda x: x.swapaxes(0, 1), "table"), {}),
    "variance for deviation": ("coatnet_bn_0_rw", _leaf(jnp.square, "var"), {}),
    "epsilon": ("coatnet_0", None, {"stem_norm_eps": 1e-3}),
    "head epsilon": ("coatnet_0_rw", None, {"head_norm_eps": 1e-3}),
    "stem activation": ("coatnet_0", None, {"stem_activation": "gelu_tanh"}),
    "squeeze late": ("coatnet_0_rw", None, {"C": {"squeeze_early": False}}),
    "squeeze activation": ("coatnet_0_rw", None, {"C": {"squeeze_activation": "silu"}}),
    "approximate gelu": ("coatnet_rmlp_2_rw", None, {"T": {"activation": "gelu_tanh"}}),
    "pooling": ("coatnet_nano_rw", None, {"C": {"pool": "max2"}}),
    "no activation first": ("coatnet_0_rw", None, {"C": {"pre_activation": False}}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_model_is_seen(mutation):
    name, wrong, fields = MUTATIONS[mutation]
    config, state, arrays = fixture(name)
    module, variables = converted(config, state)
    for letter in ("C", "T"):
        if letter in fields:
            options = {**module.blocks[letter], **fields[letter]}
            fields = {"blocks": {**module.blocks, letter: options}}
    variables = wrong(variables) if wrong else variables
    logits = logits_of(module.clone(**fields), variables, image(arrays))
    assert error(logits, arrays["output"]) > 2e-5


def test_the_grouping_of_heads_is_seen(monkeypatch):
    """[q, k, v][head] instead of [head][q, k, v] fits every shape, and is wrong."""
    config, state, arrays = fixture("coatnet_0")
    original = coatnet._transform

    def grouped(path, shape):
        if path[-2] != "qkv":
            return original(path, shape)
        return lambda array: (array if path[-1] == "bias" else weights.dense(array)).reshape(shape)

    monkeypatch.setattr(coatnet, "_transform", grouped)
    logits = logits_of(*converted(config, state), image(arrays))
    assert error(logits, arrays["output"]) > 1e-2


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", MODELS)
def test_every_name_and_shape_of_timm_is_mapped(name, monkeypatch):
    entry = MODELS[name]
    # zeros without memory, and no copies of them: coatnet_5 would be 2.7 GB
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in entry["arrays"]}
    monkeypatch.setattr(weights, "jnp", SimpleNamespace(asarray=lambda value, dtype: value))
    module, variables = timm.load(f"timm/{name}.some_tag", state)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == entry["parameters"]
    assert module.classes == 1000
    found = {}  # and back
    for keys, leaf in jax.tree.leaves_with_path(variables):
        path = tuple(key.key for key in keys)
        found[coatnet._key(module, path)] = list(coatnet._shape(path, leaf.shape))
    assert found == {key: shape for key, shape in entry["arrays"] if "num_batches" not in key}
    size = tuple(entry["image_size"])
    base, arguments = timm.describe(module, variables, size)
    assert base.rpartition("_")[0] == name.rpartition("_")[0]
    assert arguments == ({} if size == (224, 224) else {"img_size": size})


def test_names_without_resolution():
    with pytest.raises(ValueError, match="coatnet_0_rw at 224x224"):
        timm.load("coatnet_0_rw", {})
    with pytest.raises(ValueError, match="coatnet_rmlp_2_rw at 384x384"):
        timm.load("coatnet_rmlp_2_rw_384", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coatnet_9", '"coatnet_9".*"coatnet_'),
        ("resnet50", '"resnet50"'),
        ("coatnet_cttt", '"coatnet_cttt"'),  # ours, not timm's
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        timm.load(name, {})


# ---------------------------------------------------------------------------- strictness


def test_missing_left_over_and_misshapen_names_are_all_listed():
    config, state, _ = fixture("coatnet_0")
    del state["stem.conv1.weight"], state["head.fc.bias"]
    state["head.extra.weight"] = np.zeros(3)
    state["head.norm.weight"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"head\.fc\.bias, stem\.conv1\.weight") as caught:
        converted(config, state)
    for text in ("head.extra.weight", "head.norm.weight (3,)", "head/norm/scale (64,)"):
        assert text in str(caught.value)


def test_counts_of_batches_may_be_there_or_not():
    config, state, _ = fixture("coatnet_0")
    counted = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert counted
    without = {k: v for k, v in state.items() if k not in counted}
    jax.tree.map(
        np.testing.assert_array_equal, converted(config, state)[1], converted(config, without)[1]
    )


def test_a_table_of_another_resolution_is_refused():
    config, state, _ = fixture("coatnet_0")
    config["model_kwargs"]["img_size"] = [96, 64]
    with pytest.raises(ValueError, match=r"at 96x64: .*stages\.2.*\(49, 3\)"):
        converted(config, state)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("conv_cfg", "padding", "same"),
        ("conv_cfg", "group_size", 8),
        ("conv_cfg", "attn_layer", "eca"),
        ("conv_cfg", "attn_ratio", 0.0),
        ("conv_cfg", "kernel_size", 4),
        ("conv_cfg", "act_layer", "mish"),
        ("conv_cfg", "norm_layer", "groupnorm"),
        ("conv_cfg", "pool_type", "median"),
        ("transformer_cfg", "attn_drop", 0.1),
        ("transformer_cfg", "rel_pos_type", "swin"),
        ("transformer_cfg", "norm_layer", "rmsnorm2d"),
        ("cfg", "block_type", ["C", "C", "M", "M"]),
        ("model_kwargs", "global_pool", "max"),
        ("model_kwargs", "drop_rate", 0.5),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(section, field, value):
    config, state, _ = fixture("coatnet_0")
    target = config if section == "model_kwargs" else {"cfg": config["cfg"], **config["cfg"]}
    target[section][field] = value
    with pytest.raises(ValueError, match=field):
        converted(config, state)


def test_unknown_fields_are_refused_by_name():
    config, state, _ = fixture("coatnet_0")
    config["cfg"]["conv_cfg"]["strid_mode"] = "dw"
    with pytest.raises(ValueError, match=r'conv_cfg: "strid_mode".*"stride_mode"'):
        converted(config, state)
    with pytest.raises(ValueError, match=r'"imgsize".*"img_size"'):
        timm.load("coatnet_0", state, imgsize=64)


def test_mixed_stages_repeat_their_last_type():
    cfg = {
        "depths": [2, 2, 6, 3],
        "block_type": ["C", ["T", "C"], ["C", "T"], ["C", "T", "T", "T"]],
    }
    assert coatnet.fields(cfg)["layout"] == ("CC", "TC", "CTTTTT", "CTT")
    cfg["conv_cfg"] = {"block_type": "convnext"}
    assert coatnet.fields(cfg)["layout"] == ("NN", "TN", "NTTTTT", "NTT")


def test_tensorflow_style_tables_are_reversed():
    """timm's "bias_tf" indexes by key minus query, with the heads first."""
    table = np.random.default_rng(0).normal(size=(3, 5, 7))
    path = ("params", "stage3", "block1", "attention", "relative_bias", "table")
    ours = coatnet._transform(path, (5, 7, 3))(table)
    np.testing.assert_array_equal(ours[1, 2], table[:, 5 - 1 - 1, 7 - 1 - 2])


# ---------------------------------------------------------------------------- back to timm


@pytest.mark.parametrize("name", FIXTURES)
def test_the_state_dict_comes_back_bit_for_bit(name):
    config, state, _ = fixture(name)
    found = timm.state_dict(*converted(config, state))
    assert found.keys() == state.keys()
    for key, array in state.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert "num_batches" in key or found[key].tobytes() == array.tobytes(), key


def test_a_module_that_timm_does_not_have():
    for module in (coatnet.CoAtNet(layout="CAET"), FocalTransformer()):
        with pytest.raises(ValueError, match=f"timm has no {type(module).__name__}"):
            timm.describe(module, {}, (224, 224))
