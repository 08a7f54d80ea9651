# SPDX-License-Identifier: Apache-2.0
"""Converts timm's CoAtNet configuration into fields of our module. Follows timm 1.0.31.

A value that our module cannot express is a ValueError that names it. Fields that only MaxViT
(windows, partitions, channels-last norms) or only the initialisation reads are ignored.
"""

from collections.abc import Mapping
from typing import Any

from localglobal_jax.config import validation

CFG = {
    "embed_dim": (96, 192, 384, 768),
    "depths": (2, 3, 5, 2),
    "block_type": ("C", "C", "T", "T"),
    "stem_width": 64,
    "stem_bias": False,
    "conv_cfg": {},
    "transformer_cfg": {},
    "head_hidden_size": None,
    "weight_init": "vit_eff",
}
CONV = {
    "block_type": "mbconv",
    "expand_ratio": 4.0,
    "expand_output": True,
    "kernel_size": 3,
    "group_size": 1,
    "pre_norm_act": False,
    "output_bias": True,
    "stride_mode": "dw",
    "pool_type": "avg2",
    "downsample_pool_type": "avg2",
    "padding": "",
    "attn_early": False,
    "attn_layer": "se",
    "attn_act_layer": "silu",
    "attn_ratio": 0.25,
    "init_values": 1e-6,
    "act_layer": "gelu",
    "norm_layer": "",
    "norm_layer_cl": "",
    "norm_eps": None,
}
TRANSFORMER = {
    "dim_head": 32,
    "head_first": True,
    "expand_ratio": 4.0,
    "expand_first": True,
    "shortcut_bias": True,
    "attn_bias": True,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "pool_type": "avg2",
    "rel_pos_type": "bias",
    "rel_pos_dim": 512,
    "partition_ratio": 32,
    "window_size": None,
    "grid_size": None,
    "no_block_attn": False,
    "use_nchw_attn": False,
    "init_values": None,
    "act_layer": "gelu",
    "norm_layer": "layernorm2d",
    "norm_layer_cl": "layernorm",
    "norm_eps": 1e-6,
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
}
NORMS = {"batchnorm": "batch", "batchnorm2d": "batch", "layernorm2d": "layer"}
POOLS = {"avg2": "avg2", "max2": "max2", "avg": "avg", "max": "max"}
STRIDES = {"dw": "depthwise", "1x1": "expand", "pool": "pool"}
BIASES = {"bias": "table", "bias_tf": "table", "mlp": "mlp", "": "none", None: "none"}


class Section:
    """Fields of a configuration over their defaults, with the section's name for errors."""

    def __init__(self, name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        for field in given:
            if field not in defaults:
                raise validation.unknown(f"field of timm's {name}:", field, defaults)
        self.name = name
        self.values = {**defaults, **given}

    def __getitem__(self, field: str) -> Any:
        return self.values[field]

    def refuse(self, field: str, allowed: str) -> ValueError:
        """Returns the error for a value of `field` that our module does not have."""
        return ValueError(
            f"timm's {self.name}: {field}={self.values[field]!r} has no counterpart here; "
            f"can be converted: {allowed}"
        )

    def one_of(self, field: str, allowed: Mapping[Any, Any]) -> Any:
        """Returns our name for the value of `field`."""
        value = self.values[field]
        if not isinstance(value, str | None) or value not in allowed:
            raise self.refuse(field, ", ".join(map(repr, allowed)))
        return allowed[value]

    def must_be(self, field: str, *allowed: Any) -> None:
        """Raises ValueError for any other value of `field`."""
        if self.values[field] not in allowed:
            raise self.refuse(field, ", ".join(map(repr, allowed)))


def fields(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `CoAtNet` that equal timm's configuration (a nested dict)."""
    top = Section("cfg", cfg, CFG)
    conv = Section("conv_cfg", top["conv_cfg"], CONV)
    attention = Section("transformer_cfg", top["transformer_cfg"], TRANSFORMER)
    conv.must_be("block_type", "mbconv", "convnext")
    conv.must_be("padding", "")
    convnext = conv["block_type"] == "convnext"
    letters = {"C": "N" if convnext else "C", "T": "T"}
    layout = tuple(
        _letters(kind, depth, letters)
        for kind, depth in zip(top["block_type"], top["depths"], strict=False)
    )
    # timm fills these in according to the kind of block
    conv.values["norm_layer"] = conv["norm_layer"] or ("layernorm2d" if convnext else "batchnorm2d")
    conv.values["norm_eps"] = conv["norm_eps"] or (1e-6 if convnext else 1e-5)
    stem = top["stem_width"]
    used = set("".join(layout))
    blocks = {}
    if "C" in used:
        blocks["C"] = _mbconv(conv)
    if "N" in used:
        blocks["N"] = _convnext(conv)
    if "T" in used:
        blocks["T"] = _transformer(attention)
    return {
        "layout": layout,
        "depths": tuple(top["depths"]),
        "widths": tuple(top["embed_dim"]),
        "blocks": blocks,
        "stem": (stem, stem) if isinstance(stem, int) else tuple(stem),
        "stem_bias": top["stem_bias"],
        "stem_activation": conv.one_of("act_layer", ACTIVATIONS),
        "stem_norm": conv.one_of("norm_layer", NORMS),
        "stem_norm_eps": conv["norm_eps"],
        "head_hidden": top["head_hidden_size"] or 0,
        "head_norm": attention.one_of("norm_layer", NORMS),
        "head_norm_eps": attention["norm_eps"],
        "head_norm_first": not top["head_hidden_size"],
    }


def _letters(kind: Any, depth: int, letters: Mapping[str, str]) -> str:
    """Returns a stage's blocks. timm repeats the last type, our layouts the pattern."""
    kinds = [kind] if isinstance(kind, str) else list(kind)
    for name in kinds:
        if name not in letters:
            raise ValueError(
                f"timm's cfg: block_type {name!r} has no counterpart here; "
                f"can be converted: {', '.join(map(repr, letters))}"
            )
    kinds = (kinds + kinds[-1:] * depth)[:depth]
    return "".join(letters[name] for name in kinds)


def _mbconv(conv: Section) -> dict[str, Any]:
    conv.must_be("group_size", 1)
    excite = conv["attn_layer"] not in (None, False)
    if excite:
        conv.must_be("attn_layer", "se", None, False)
    if excite and not conv["attn_ratio"] > 0:
        raise conv.refuse("attn_ratio", "positive numbers")
    if conv["kernel_size"] % 2 == 0:
        raise conv.refuse("kernel_size", "odd numbers")
    return {
        "expansion": conv["expand_ratio"],
        "expand_from": "output" if conv["expand_output"] else "input",
        "window": conv["kernel_size"],
        "stride_at": conv.one_of("stride_mode", STRIDES),
        "pool": conv.one_of("pool_type", POOLS),
        "main_pool": _main_pool(conv),
        "pre_activation": conv["pre_norm_act"],
        "activation": conv.one_of("act_layer", ACTIVATIONS),
        "squeeze_ratio": conv["attn_ratio"] if excite else 0.0,
        "squeeze_early": conv["attn_early"],
        "squeeze_activation": conv.one_of("attn_act_layer", ACTIVATIONS) if excite else "silu",
        "use_bias": conv["output_bias"],
        "norm": conv.one_of("norm_layer", NORMS),
        "norm_eps": conv["norm_eps"],
    }


def _main_pool(conv: Section) -> str:
    return conv.one_of(
        "downsample_pool_type" if conv["downsample_pool_type"] else "pool_type", POOLS
    )


def _convnext(conv: Section) -> dict[str, Any]:
    conv.must_be("output_bias", True)
    conv.must_be("stride_mode", "dw", "pool")
    return {  # timm passes neither kernel_size nor pool_type on to this block
        "expansion": conv["expand_ratio"],
        "stride_at": conv.one_of("stride_mode", STRIDES),
        "main_pool": _main_pool(conv),
        "activation": conv.one_of("act_layer", ACTIVATIONS),
        "norm": conv.one_of("norm_layer", NORMS),
        "norm_eps": conv["norm_eps"],
        "layer_scale": conv["init_values"] or None,
    }


def _transformer(attention: Section) -> dict[str, Any]:
    # Dropout inside the block acts in training only, but then a model fine-tuned here would differ.
    attention.must_be("attn_drop", 0.0)
    attention.must_be("proj_drop", 0.0)
    # head_first is ignored: timm reads it for MaxViT, its CoAtNet block is always head-first.
    return {
        "head_width": attention["dim_head"],
        "expansion": attention["expand_ratio"],
        "widen_at": "qkv" if attention["expand_first"] else "output",
        "bias": attention.one_of("rel_pos_type", BIASES),
        "bias_hidden": attention["rel_pos_dim"],
        "pool": attention.one_of("pool_type", POOLS),
        "norm": attention.one_of("norm_layer", NORMS),
        "norm_eps": attention["norm_eps"],
        "activation": attention.one_of("act_layer", ACTIVATIONS),
        "shortcut_bias": attention["shortcut_bias"],
        "qkv_bias": attention["attn_bias"],
        "layer_scale": attention["init_values"] or None,
    }
