# SPDX-License-Identifier: Apache-2.0
"""Converts VOLO's published weights; timm and the authors use the same names."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.convert import adapt, weights
from localglobal_jax.convert.weights import Variables
from localglobal_jax.models import VOLO, volo

# timm's argument -> its default there; None: the argument must be given.
ARGUMENTS: dict[str, Any] = {
    "layers": None,
    "embed_dims": None,
    "num_heads": None,
    "img_size": "that of the weights",
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "token",
    "patch_size": 8,
    "stem_hidden_dim": 64,
    "downsamples": (True, False, False, False),
    "outlook_attention": (True, False, False, False),
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "drop_rate": 0.0,
    "pos_drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "post_layers": ("ca", "ca"),
    "use_aux_head": True,
    "use_mix_token": False,
    "pooling_scale": 2,
}


def arguments(name: str) -> dict[str, Any]:
    """Returns timm's arguments of one of its model names, e.g. ``"volo_d1_384"``, for `load`."""
    found = re.fullmatch(r"(volo_d[1-5])_(\d+)(\.\w+)?", name)
    if not found:
        raise ValueError(f'"{name}" is not a VOLO of timm: give a name such as volo_d1_224')
    module = VOLO(**volo.VARIANTS[found[1]])
    return {
        "layers": module.depths,
        "embed_dims": module.widths,
        "num_heads": module.heads,
        "stem_hidden_dim": module.stem,
        "mlp_ratio": module.expansion,
        "img_size": int(found[2]),
    }


def load(name_or_cfg: str, state_dict: Mapping[str, Any], **kwargs: Any) -> tuple[VOLO, Variables]:
    """Returns the module of timm's ``VOLO(**kwargs)`` and its variables from `state_dict`.

    `name_or_cfg` is "volo", with all of timm's arguments in `kwargs`, or one of timm's names
    (``"volo_d1_384"``), whose arguments `kwargs` override. The position embedding is resized if
    ``img_size`` (a number or (height, width)) is not that of the weights. Of the dropout rates only
    that of drop path is carried over (the published recipes have no other); ``pooling_scale``
    follows from the downsamplings.

    Raises ValueError for arguments that are unknown or have no counterpart, and for names that are
    missing, left over, or of another shape.
    """
    if name_or_cfg != "volo":
        kwargs = {**arguments(name_or_cfg), **kwargs}
    module = build(kwargs)
    strides = (stage.stride for stage in module.stages()[: module.position])
    scale = module.patch * math.prod(strides)
    _, rows, columns, _ = _shape(state_dict, "pos_embed", (1, 1, 1, 1))
    _, channels, _, _ = _shape(state_dict, "patch_embed.conv.0.weight", (1, 3, 7, 7))
    channels = kwargs.get("in_chans", channels)
    # Only shapes: nothing of a random initialisation is computed or kept.
    template = jax.eval_shape(
        module.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, rows * scale, columns * scale, channels), jnp.float32),
    )
    variables = weights.assemble(
        template,
        state_dict,
        _source(module),
        ignored=lambda name: name.endswith(".num_batches_tracked"),
        what="these arguments of VOLO",
    )
    if kwargs.get("img_size") is not None:
        size = weights.sides(kwargs["img_size"])
        variables = adapt.resize(module, variables, size, channels=channels)
    return module, variables


def state_dict(module: VOLO, variables: Variables) -> dict[str, np.ndarray]:
    """Returns timm's state dict of our variables, the inverse of `load`."""
    return weights.with_batch_counts(weights.disassemble(variables, _source(module), _their_shape))


def name_of(module: VOLO) -> str | None:
    """Returns timm's name of our module, without a resolution; None if timm has none."""
    free = {
        field: getattr(module, field)
        for field in ("classes", "aux_head", "mix_token", "drop_path", "dtype")
    }
    return next((name for name in names() if VOLO(**volo.VARIANTS[name], **free) == module), None)


def names() -> list[str]:
    """Returns timm's names of VOLOs, without their resolutions."""
    return [*volo.VARIANTS]


def _source(
    module: VOLO,
) -> Callable[[weights.Path, tuple[int, ...]], tuple[str, weights.Transform]]:
    modules = _modules(module)
    return lambda path, shape: (
        _their_name("/".join(path), modules),
        lambda array: _turn(array, shape),
    )


def build(kwargs: Mapping[str, Any]) -> VOLO:
    """Returns the module of timm's ``VOLO(**kwargs)``."""
    unknown = sorted(set(kwargs) - set(ARGUMENTS))
    missing = sorted(k for k, v in ARGUMENTS.items() if v is None and kwargs.get(k) is None)
    if unknown or missing:
        raise ValueError(
            f"VOLO arguments: unknown {unknown}, missing {missing}; "
            f"known are {', '.join(ARGUMENTS)}"
        )
    given = {**ARGUMENTS, **kwargs}
    count = len(given["layers"])
    down = (*given["downsamples"], *(False,) * count)[: count - 1]
    blocks = tuple(given["post_layers"] or ())
    ratio = given["mlp_ratio"]
    if set(blocks) - {"ca"}:
        raise ValueError(f'post_layers={blocks}: give only "ca" (class attention)')
    aux = bool(given["use_aux_head"] and given["num_classes"])
    # Without class attention timm's heads still take the first token for a class token.
    if given["global_pool"] != ("token" if blocks else "avg") or (aux and not blocks):
        raise ValueError(
            f'global_pool="{given["global_pool"]}" with post_layers={blocks}, use_aux_head={aux}: '
            'use "token" with post_layers, or "avg" and no auxiliary head without'
        )
    # The embedding is added before the third of timm's modules; a downsampling counts as one.
    order = [item for i in range(count) for item in ((i, "stage"), (i, "down"))]
    order = [(i, kind) for i, kind in order if kind == "stage" or (i < count - 1 and down[i])]
    if len(order) > 2 and order[2][1] == "down":
        raise ValueError(
            f"downsamples={given['downsamples']} puts the position embedding before a "
            "downsampling: give downsamples that put it before blocks"
        )
    return VOLO(
        classes=given["num_classes"],
        layout="".join("O" if o else "S" for o in given["outlook_attention"][:count]),
        depths=tuple(given["layers"]),
        widths=tuple(given["embed_dims"]),
        strides=(1, *(2 if d else 1 for d in down)),
        heads=tuple(given["num_heads"]),
        expansion=tuple(ratio) if isinstance(ratio, list | tuple) else float(ratio),
        stem=given["stem_hidden_dim"],
        patch=given["patch_size"],
        position=order[2][0] + 1 if len(order) > 2 else 0,
        class_blocks=len(blocks),
        aux_head=aux,
        mix_token=given["use_mix_token"],
        qkv_bias=given["qkv_bias"],
        drop_path=given["drop_path_rate"],
    )


def _shape(
    state_dict: Mapping[str, Any], name: str, default: tuple[int, int, int, int]
) -> tuple[int, ...]:
    """Returns the shape of a 4-D array, else `default`: strict assembly reports the error."""
    shape = tuple(np.shape(state_dict.get(name, 0)))
    return shape if len(shape) == len(default) else default


def _modules(module: VOLO) -> dict[str, str]:
    """Returns our modules, blocks and free parameters -> timm's names."""
    modules = {
        "params/position": "pos_embed",
        "params/head/class_token": "cls_token",
        "head/classifier": "head",
        "head/aux_classifier": "aux_head",
        "head/norm": "norm",
        "stem/project": "patch_embed.proj",
    }
    for i in range(3):  # convolution, norm and activation alternate in timm's sequence
        modules[f"stem/conv{i + 1}"] = f"patch_embed.conv.{3 * i}"
        modules[f"stem/norm{i + 1}"] = f"patch_embed.conv.{3 * i + 1}"
    index, width = 0, module.widths[0]
    for i, stage in enumerate(module.stages(), start=1):
        if stage.stride > 1 or stage.width != width:
            modules[f"downsample{i}"] = f"network.{index}.proj"
            index, width = index + 1, stage.width
        for j in range(len(stage.letters)):
            modules[f"stage{i}/block{j + 1}"] = f"network.{index}.{j}"
        index += 1
    for j in range(module.class_blocks):
        modules[f"head/block{j + 1}"] = f"post_network.{j}"
    return modules


PARTS = {
    "norm": "norm1",
    "mlp_norm": "norm2",
    "mlp/hidden": "mlp.fc1",
    "mlp/output": "mlp.fc2",
    "outlook/value": "attn.v",
    "outlook/weights": "attn.attn",
    "outlook/output": "attn.proj",
    "attention/qkv": "attn.qkv",
    "attention/query": "attn.q",
    "attention/key_value": "attn.kv",
    "attention/output": "attn.proj",
}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _their_name(path: str, modules: Mapping[str, str]) -> str:
    if path in modules:
        return modules[path]
    _, _, inner = path.partition("/")  # without the collection
    inner, _, leaf = inner.rpartition("/")
    if inner in modules:
        return f"{modules[inner]}.{LEAVES[leaf]}"
    block = "/".join(inner.split("/")[:2])
    return f"{modules[block]}.{PARTS[inner[len(block) + 1 :]]}.{LEAVES[leaf]}"


def _their_shape(path: weights.Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of their array for the leaf at `path`, which has `shape`."""
    leaf = path[-1]
    if leaf in ("position", "class_token"):
        return (*(1,) * ((4 if leaf == "position" else 3) - len(shape)), *shape)
    if leaf != "kernel":
        return (math.prod(shape),)
    if path[1] == "stem" or path[1].startswith("downsample"):
        return shape[-1], shape[-2], *shape[:-2]
    return math.prod(shape[1:]), shape[0]


def _turn(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array in our axes: input before output, heads apart, embeddings without batch."""
    if (extra := array.ndim - len(shape)) > 0:
        ones = array.shape[:extra] == (1,) * extra
        return array.reshape(array.shape[extra:]) if ones else array
    if array.ndim == 4:
        return weights.convolution(array)
    if array.ndim == 2:
        return weights.dense(array).reshape(array.shape[1], *shape[1:])
    return array.reshape(shape)
