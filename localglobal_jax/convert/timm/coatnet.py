# SPDX-License-Identifier: Apache-2.0
"""Converts timm's CoAtNet: names -> our paths, arrays -> our layout."""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config import validation
from localglobal_jax.convert import weights
from localglobal_jax.convert.timm.coatnet_config import Section, fields
from localglobal_jax.convert.weights import Path, Transform, Variables
from localglobal_jax.models.coatnet import VARIANTS, CoAtNet
from localglobal_jax.models.coatnet_variants import TIMM

# ---------------------------------------------------------------------------- names

TOP = {
    "stem/conv1": "stem.conv1",
    "stem/norm": "stem.norm1",
    "stem/conv2": "stem.conv2",
    "head/hidden": "head.pre_logits.fc",
    "head/classifier": "head.fc",
}
MLP = {"mlp/hidden": "mlp.fc1", "mlp/output": "mlp.fc2"}
INSIDE = {
    "C": {
        "shortcut/project": "shortcut.expand",
        "norm": "pre_norm",
        "expand": "conv1_1x1",
        "expand_norm": "norm1",
        "depthwise": "conv2_kxk",
        "depthwise_norm": "norm2",
        "squeeze_excite/reduce": "se.fc1",
        "squeeze_excite/expand": "se.fc2",
        "project": "conv3_1x1",
    },
    "N": {
        "shortcut/project": "shortcut.expand",
        "depthwise": "conv_dw",
        "norm": "norm",
        "scale": "ls",
        **MLP,
    },
    "T": {
        "shortcut/project": "shortcut.expand",
        "norm": "norm1",
        "attention/qkv": "attn.qkv",
        "attention/output": "attn.proj",
        "attention/relative_bias": "attn.rel_pos",
        "attention/relative_bias/hidden": "attn.rel_pos.mlp.fc1",
        "attention/relative_bias/output": "attn.rel_pos.mlp.fc2",
        "attention_scale": "ls1",
        "mlp_norm": "norm2",
        "mlp_scale": "ls2",
        **MLP,
    },
}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "table": "relative_position_bias_table",
}


def _key(module: CoAtNet, path: Path) -> str:
    """Returns timm's name of the leaf at `path` of our variables."""
    _, *middle, leaf = path
    if middle[0].startswith("stage"):
        stage, block = (int(re.sub(r"\D", "", part)) - 1 for part in middle[:2])
        inside = "/".join(middle[2:])
        letter = module.stages()[stage].letters[block]
        theirs = INSIDE[letter][inside]
        if letter == "T" and inside == "norm" and block == 0:
            theirs = "norm1.norm"  # the first block of a stage pools after it
        if letter == "C" and module.blocks.get("C", {}).get("squeeze_early"):
            theirs = theirs.replace("se.", "se_early.")
        prefix = f"stages.{stage}.blocks.{block}.{theirs}"
    elif middle == ["head", "norm"]:
        prefix = "norm" if module.head_norm_first else "head.norm"
    else:
        prefix = TOP["/".join(middle)]
    return f"{prefix}.{'gamma' if middle[-1].endswith('scale') else LEAVES[leaf]}"


def _transform(path: Path, shape: tuple[int, ...]) -> Transform:
    """Returns the function from timm's array to the leaf at `path`, which has `shape`."""
    module, leaf = path[-2:]
    if module == "qkv":  # their channels are [head][q, k, v][width of a head]
        _, heads, width = shape[-3:]

        def qkv(array: np.ndarray) -> np.ndarray:
            if leaf == "bias":
                return array.reshape(heads, 3, width).swapaxes(0, 1)
            array = weights.dense(array)
            return array.reshape(-1, heads, 3, width).swapaxes(1, 2)

        return qkv
    if leaf == "table":

        def table(array: np.ndarray) -> np.ndarray:
            if array.ndim == 3:  # "bias_tf": [head, key - query]; ours is query - key
                return np.moveaxis(array, 0, -1)[::-1, ::-1]
            return array.reshape(shape)

        return table
    if leaf != "kernel":
        return weights.as_is
    if module == "depthwise":
        return weights.depthwise
    return weights.convolution if module.startswith("conv") else weights.dense


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of timm's array for the leaf at `path`, which has `shape`."""
    module, leaf = path[-2:]
    if leaf == "table":
        return math.prod(shape[:-1]), shape[-1]
    if leaf != "kernel":
        return (math.prod(shape),)
    if module == "depthwise":
        return shape[-1], 1, *shape[:-1]
    if module.startswith("conv"):
        return shape[-1], shape[-2], *shape[:-2]
    linear = (math.prod(shape[1:]), shape[0])
    # of the maps inside a block all but that of relative positions are convolutions there
    mapped = path[1].startswith("stage") and "relative_bias" not in path
    return (*linear, 1, 1) if mapped else linear


# ---------------------------------------------------------------------------- the converter

MODEL = {
    "img_size": None,
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "avg",
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
}


def load(
    name_or_cfg: str | Mapping[str, Any], state_dict: Mapping[str, Any], **model_kwargs: Any
) -> tuple[nn.Module, Variables]:
    """Returns module and variables; see `timm.load`.

    The relative tables must be of ``img_size``: resize afterwards (`adapt`).
    """
    model = Section("model arguments", model_kwargs, MODEL)
    model.must_be("global_pool", "avg")
    model.must_be("drop_rate", 0.0)
    if isinstance(name_or_cfg, str):
        what, spec, size = _named(name_or_cfg)
    else:
        what, spec, size = "this CoAtNet", fields(name_or_cfg), 224
    module = CoAtNet(**spec, classes=model["num_classes"], drop_path=model["drop_path_rate"])
    height, width = weights.sides(model["img_size"] or size)
    image = jax.ShapeDtypeStruct((1, height, width, model["in_chans"]), jnp.float32)
    variables = weights.assemble(
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image),
        state_dict,
        lambda path, shape: (_key(module, path), _transform(path, shape)),
        ignored=lambda name: name.endswith("num_batches_tracked"),  # torch counts, we do not
        what=f"{what} at {height}x{width}",
    )
    return module, variables


def state_dict(module: CoAtNet, variables: Variables) -> dict[str, np.ndarray]:
    """Returns timm's state dict of our variables, the inverse of `load`.

    Relative tables have timm's form "bias", which all of its CoAtNets have.
    """
    state = weights.disassemble(
        variables, lambda path, shape: (_key(module, path), _transform(path, shape)), _shape
    )
    return weights.with_batch_counts(state)


def name_of(module: CoAtNet) -> str | None:
    """Returns timm's name of our module, without a resolution; None if timm has none."""
    free = {"classes": module.classes, "drop_path": module.drop_path, "dtype": module.dtype}
    return next((base for base in names() if CoAtNet(**{**_spec(base), **free}) == module), None)


def names() -> list[str]:
    """Returns timm's names of CoAtNets, without their resolutions."""
    return [known for known in VARIANTS if known in TIMM or re.fullmatch(r"coatnet_[0-5]", known)]


def _spec(base: str) -> dict[str, Any]:
    spec = dict(VARIANTS[base])
    if base == "coatnet_5":
        spec["blocks"] = {}  # timm's heads are 32 wide; the paper's, and ours of that name, 64
    return spec


def _named(name: str) -> tuple[str, dict[str, Any], int]:
    """Returns our name, fields and image size of a timm name."""
    match = re.fullmatch(r"(.+)_(\d{3})", name)
    base, size = (match[1], int(match[2])) if match else (name, 224)
    if base not in names():
        raise validation.unknown("timm model", name, names())
    return base, _spec(base), size
