# SPDX-License-Identifier: Apache-2.0
"""Weights of the authors' Focal Transformers (PyTorch names) -> our module and variables."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from localglobal_jax.config import loading
from localglobal_jax.convert import focal_buffers
from localglobal_jax.convert.focal_names import convert, reference
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.operators.focal import PoolMethod

DEFAULTS: dict[str, Any] = {  # of the reference's constructor
    "img_size": 224,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 1000,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "qk_scale": None,
    "drop_path_rate": 0.1,
    "ape": False,
    "patch_norm": True,
    "use_shift": False,
    "focal_stages": (0, 1, 2, 3),
    "focal_levels": (1, 1, 1, 1),
    "focal_windows": (7, 5, 3, 1),
    "focal_topK": 64,
    "focal_pool": "fc",
    "expand_sizes": (3, 3, 3, 3),
    "expand_layer": "all",
    "use_conv_embed": False,
    "use_layerscale": False,
    "layerscale_value": 1e-4,
    "use_pre_norm": False,
}
CHOICES = {
    "expand_layer": ("all", "even", "odd"),
    "focal_pool": ("none", *get_args(PoolMethod)),
}
# What our modules do not have or never use: the last two change nothing in the reference either.
FIXED: dict[str, Any] = {"drop_rate": 0.0, "attn_drop_rate": 0.0}
IGNORED = ("expand_stages", "use_checkpoint")


def fields(kwargs: Mapping[str, Any], *, nearest: bool = False) -> dict[str, Any]:
    """The reference constructor's arguments as fields of `FocalTransformer`.

    `nearest`: for the authors' second ("fast") class, which has the same arguments. Raises
    ValueError for arguments that it does not have, and for values that we do not build.
    """
    for name in kwargs:
        if name not in {*DEFAULTS, *FIXED, *IGNORED}:
            raise loading.unknown("argument of FocalTransformer", name, {*DEFAULTS, *FIXED})
    for name, value in FIXED.items():
        if kwargs.get(name, value) != value:
            raise ValueError(f"{name}={kwargs[name]}: dropout is not built; use {name}={value}")
    args = {**DEFAULTS, **kwargs}
    stages = range(len(args["depths"]))
    size = args["img_size"]
    for name, allowed in CHOICES.items():
        if args[name] not in allowed:
            raise ValueError(f"{name}={args[name]!r}: allowed are {', '.join(allowed)}")

    # Without pooling there are no coarse levels; at level 0 there are no neighbours either.
    pooled = [args["focal_pool"] != "none" and i in args["focal_stages"] for i in stages]
    levels = [args["focal_levels"][i] for i in stages]
    return {
        "classes": args["num_classes"],
        "layout": "F" * len(stages),
        "depths": tuple(args["depths"]),
        "widths": tuple(args["embed_dim"] << i for i in stages),
        "heads": tuple(args["num_heads"][i] for i in stages),
        "window": args["window_size"],
        "expand": tuple(args["expand_sizes"][i] if levels[i] > 0 else 0 for i in stages),
        "levels": tuple(max(levels[i], 1) if pooled[i] else 1 for i in stages),
        "focal_windows": tuple(args["focal_windows"][i] for i in stages),
        "focal_pool": args["focal_pool"] if any(pooled) else "fc",
        # the reference's "even" means: not in even blocks
        "expand_except": "none" if args["expand_layer"] == "all" else args["expand_layer"],
        "shift": bool(args["use_shift"]),
        "nearest": args["focal_topK"] if nearest else 0,
        "image_size": size if isinstance(size, int) else tuple(size),
        "patch": args["patch_size"],
        "conv_embed": bool(args["use_conv_embed"]),
        "stem_norm": bool(args["patch_norm"]),
        "pre_norm": bool(args["use_pre_norm"]),
        "position_embedding": bool(args["ape"]),
        "expansion": args["mlp_ratio"],
        "qkv_bias": bool(args["qkv_bias"]),
        "scale": args["qk_scale"] or None,
        "layer_scale": args["layerscale_value"] if args["use_layerscale"] else None,
        "drop_path": args["drop_path_rate"],
    }


def load(
    kwargs: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[FocalTransformer, dict[str, Any]]:
    """The module and variables of a reference state dict (name -> array).

    Every parameter must be found and every entry be used, or ValueError lists them. Index tables
    and masks among the entries are compared with what the configuration implies. As it comes, the
    module runs on images of any size, with the windows of ``img_size``.

    Args:
      kwargs: what the reference's constructor was called with.
      state_dict: of the authors' first models, or of their second, told apart by its names.
      image_size: chooses the windows anew, for images of this size. Where a window changes with
        it, its bias tables and pooling kernels are resized bilinearly; where one gains neighbours
        (the last stage of the published models above 224), their biases start at 0.
      **overrides: fields of `FocalTransformer`, e.g. ``dtype="bfloat16"``. Another number of
        ``classes`` drops the classifier: the new one starts at 0.
    """
    nearest = any("coord2rpb_all" in name for name in state_dict)
    source = FocalTransformer(**fields(kwargs, nearest=nearest))
    channels = kwargs.get("in_chans", DEFAULTS["in_chans"])
    params, choices = read(source, channels, state_dict)
    known = {field.name for field in dataclasses.fields(source)} - {"parent", "name"}
    for name in overrides:
        if name not in known:
            raise loading.unknown("override", name, known)
    chosen = source.image_size if image_size is None else image_size
    module = source.clone(image_size=chosen, **overrides)
    leaves = fit(params, parameter_shapes(module, channels), module.classes != source.classes)
    variables = {"params": flax.traverse_util.unflatten_dict(leaves, sep="/")}
    if choices and image_size is None:
        variables["nearest"] = flax.traverse_util.unflatten_dict(choices, sep="/")
    return module, variables


def read(
    module: FocalTransformer, channels: int, state_dict: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Array]]:
    """Our paths -> values, and the choices among equally near keys; see `load` for the errors."""
    params: dict[str, np.ndarray] = {}
    missing, used = [], set()
    for path, shape in parameter_shapes(module, channels).items():
        name, theirs = reference(path, shape)
        if name not in state_dict:
            missing.append(name)
            continue
        used.add(name)
        value = np.asarray(state_dict[name], np.float32)
        if value.shape != theirs:
            raise ValueError(f"{name} has shape {value.shape}; the configuration implies {theirs}")
        params[path] = convert(path, value, shape)
    rest = {name: np.asarray(state_dict[name]) for name in state_dict if name not in used}
    left_over, choices = focal_buffers.check(module, rest)
    if missing or left_over:
        raise ValueError(
            f"the state dict does not fit the configuration: missing {sorted(missing) or 'none'}, "
            f"left over {sorted(left_over) or 'none'}"
        )
    return params, choices


def fit(
    params: Mapping[str, np.ndarray], target: Mapping[str, tuple[int, ...]], new_classes: bool
) -> dict[str, Array]:
    """The parameters in the shapes of another image size or number of classes.

    What has no source starts at 0: a new classifier, and the biases of neighbours that a window
    had none of. Raises ValueError where anything else appears or disappears.
    """
    leaves = {}
    for path, shape in target.items():
        if new_classes and path.startswith("head/classifier/"):
            leaves[path] = jnp.zeros(shape)
        elif path in params:
            value = params[path]
            leaves[path] = jnp.asarray(
                value if value.shape == shape else resize(path, value, shape)
            )
        elif path.endswith("/neighbour_bias"):
            leaves[path] = jnp.zeros(shape)
        else:
            raise ValueError(
                f"with these overrides {path} is needed, which the weights do not have"
            )
    for path in params.keys() - target.keys():
        if not path.startswith("head/classifier/") and not path.endswith("/neighbour_bias"):
            raise ValueError(f"with these overrides {path} of the weights would not be used")
    return leaves


def parameter_shapes(module: nn.Module, channels: int) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter; nothing is allocated."""
    size = module.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A bias table, pooling kernel or position embedding for a window of another size.

    Bilinear, without anti-aliasing. A pooling kernel keeps its sum, so that it still averages.
    """
    table = re.search(r"(window_bias|pooled\d+_bias|pool\d+/kernel|^position)$", path)
    if not table or len(value.shape) != len(shape) or value.shape[2:] != shape[2:]:
        raise ValueError(f"{path} has shape {value.shape} and cannot be resized to {shape}")
    resized = np.asarray(jax.image.resize(value, shape, "bilinear", antialias=False))
    if path.endswith("kernel"):
        resized = resized * (value.shape[0] / shape[0]) ** 2
    return resized
