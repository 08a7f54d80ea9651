# SPDX-License-Identifier: Apache-2.0
"""Converts weights of the authors' Focal Transformers (PyTorch names).

>>> fields = lg.convert.focal.fields({"img_size": 224, "embed_dim": 96, "depths": [2, 2, 6, 2]})
>>> lg.models.FocalTransformer(**fields).widths
(96, 192, 384, 768)
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from localglobal_jax.config import validation
from localglobal_jax.convert import weights
from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.operators import focal
from localglobal_jax.operators.focal import PoolMethod
from localglobal_jax.operators.focal_nearest import nearest

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
# Arguments without a field of ours. The ignored two change nothing in the reference either.
FIXED: dict[str, Any] = {"drop_rate": 0.0, "attn_drop_rate": 0.0}
IGNORED = ("expand_stages", "use_checkpoint")


# ---------------------------------------------------------------------------- arguments


def fields(kwargs: Mapping[str, Any], *, nearest: bool = False) -> dict[str, Any]:
    """Returns the reference constructor's arguments as fields of `FocalTransformer`.

    `nearest`: for the authors' second ("fast") class, which has the same arguments. Raises
    ValueError for arguments that it does not have, and for values that are not built.
    """
    for name in kwargs:
        if name not in {*DEFAULTS, *FIXED, *IGNORED}:
            raise validation.unknown("argument of FocalTransformer", name, {*DEFAULTS, *FIXED})
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


# ---------------------------------------------------------------------------- loading


def load(
    kwargs: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[FocalTransformer, dict[str, Any]]:
    """Returns the module and variables of a reference state dict (name -> array).

    Every parameter must be found and every entry be used, or ValueError lists them. Index tables
    and masks among the entries are compared with those of the configuration.
    The module runs on images of any size, with the windows of ``img_size``.

    Args:
      kwargs: the arguments of the reference's constructor.
      state_dict: of the authors' first models, or of their second, recognised by its names.
      image_size: chooses the windows anew, for images of this size. If a window changes with
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
            raise validation.unknown("override", name, known)
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
    """Returns our paths -> values, and the choices among equally near keys. Errors: see `load`."""
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
    left_over, choices = check(module, rest)
    if missing or left_over:
        raise ValueError(
            f"the state dict does not fit the configuration: missing {sorted(missing) or 'none'}, "
            f"left over {sorted(left_over) or 'none'}"
        )
    return params, choices


def fit(
    params: Mapping[str, np.ndarray], target: Mapping[str, tuple[int, ...]], new_classes: bool
) -> dict[str, Array]:
    """Returns the parameters in the shapes of another image size or number of classes.

    Parameters without a source start at 0: a new classifier, and the biases of new neighbours.
    Raises ValueError if anything else appears or disappears.
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
    """Returns path -> shape of every parameter; nothing is allocated."""
    height, width = weights.sides(module.image_size)
    image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a bias table, pooling kernel or position embedding for another window size.

    Bilinear, without anti-aliasing. A pooling kernel keeps its sum, so that it still averages.
    """
    table = re.search(r"(window_bias|pooled\d+_bias|pool\d+/kernel|^position)$", path)
    if not table or len(value.shape) != len(shape) or value.shape[2:] != shape[2:]:
        raise ValueError(f"{path} has shape {value.shape} and cannot be resized to {shape}")
    resized = np.asarray(jax.image.resize(value, shape, "bilinear", antialias=False))
    if path.endswith("kernel"):
        resized = resized * (value.shape[0] / shape[0]) ** 2
    return resized


# ---------------------------------------------------------------------------- names

# ours -> the reference's; stages and blocks count from 0 there
RENAMED: tuple[tuple[str, Any], ...] = (
    (r"^stem/conv/", "patch_embed.proj/"),
    (r"^stem/norm/", "patch_embed.norm/"),
    (r"^position$", "absolute_pos_embed"),
    (r"^stage(\d+)/downsample/conv/", lambda m: f"layers.{int(m[1]) - 2}.downsample.proj/"),
    (r"^stage(\d+)/downsample/", lambda m: f"layers.{int(m[1]) - 2}.downsample."),
    (r"^stage(\d+)/block(\d+)/", lambda m: f"layers.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}."),
    (r"^head/norm/", "norm/"),
    (r"^head/classifier/", "head/"),
    (r"(\.blocks\.\d+)\.norm/", r"\1.norm1/"),
    (r"\.mlp_norm/", ".norm2/"),
    (r"\.mlp/hidden/", ".mlp.fc1/"),
    (r"\.mlp/output/", ".mlp.fc2/"),
    (r"\.attention_scale/scale$", ".gamma_1"),
    (r"\.mlp_scale/scale$", ".gamma_2"),
    (r"\.attention/pool(\d+)/", lambda m: f".pool_layers.{int(m[1]) - 1}/"),
    (r"\.attention/output/", ".attn.proj/"),
    (r"\.attention/qkv/", ".attn.qkv/"),
    (r"\.attention/window_bias$", ".attn.relative_position_bias_table"),
    (r"\.attention/neighbour_bias$", ".attn.relative_position_bias_table_to_neighbors"),
    (
        r"\.attention/pooled(\d+)_bias$",
        lambda m: f".attn.relative_position_bias_table_to_windows.{int(m[1]) - 1}",
    ),
    (r"\.attention/window_bias_hidden/", ".attn.coord2rpb_all.0.0/"),
    (r"\.attention/window_bias_output/", ".attn.coord2rpb_all.0.2/"),
    (r"\.attention/pooled1_bias_hidden/", ".attn.coord2rpb_all.1.0/"),
    (r"\.attention/pooled1_bias_output/", ".attn.coord2rpb_all.1.2/"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
PER_CHANNEL = r"/pool\d+/kernel$"  # of the "conv" pool: a depthwise convolution there
HEADS_FIRST = r"/pooled\d+_bias$"  # every other table there has its heads last, as ours


def reference(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Returns the reference's name and shape of our parameter."""
    name = path
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    count = math.prod(shape)
    if path.endswith("/conv/kernel"):
        return name, (shape[3], shape[2], *shape[:2])
    if re.search(PER_CHANNEL, path) and len(shape) == 3:
        return name, (shape[2], 1, *shape[:2])
    if re.search(r"/pool\d+/kernel$", path):
        return name, (1, count)
    if re.search(HEADS_FIRST, path):
        return name, (shape[-1], count // shape[-1])
    if path.endswith("/window_bias"):
        return name, (count // shape[-1], shape[-1])
    if path.endswith("/neighbour_bias"):
        return name, (1, *shape)
    if path == "position":
        return name, (1, count // shape[-1], shape[-1])
    if path.endswith("/kernel"):
        return name, (count // shape[0], shape[0])
    return name, (count,)


def convert(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the reference's value of our parameter in our layout."""
    if path.endswith("/conv/kernel") or (re.search(PER_CHANNEL, path) and value.ndim == 4):
        return value.transpose(2, 3, 1, 0).reshape(shape)
    if re.search(HEADS_FIRST, path) or (path.endswith("/kernel") and "/pool" not in path):
        return value.T.reshape(shape)
    return value.reshape(shape)


# ---------------------------------------------------------------------------- buffers

NAME = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(?:attn\.)?([a-z_]+?)(?:_(\d+))?$")


def check(
    module: FocalTransformer, entries: Mapping[str, np.ndarray]
) -> tuple[list[str], dict[str, Array]]:
    """Returns names that are not buffers of `module`, and the choices among equally near keys.

    Raises ValueError for a buffer whose values are not those the configuration implies.
    """
    unknown, choices = [], {}
    for name, value in entries.items():
        match = NAME.match(name)
        found = match and int(match[1]) < len(module.depths)
        if not match or not found or int(match[2]) >= module.depths[int(match[1])]:
            unknown.append(name)
            continue
        stage, block = int(match[1]), int(match[2])
        options = module.block_options(stage, block)["F"]
        kind, level = match[3], None if match[4] is None else int(match[4])
        if module.nearest:
            expected = dict(_nearest_buffers(options, level))
        else:
            expected = dict(_window_buffers(options, level))
        if kind not in expected:
            unknown.append(name)
            continue
        if kind == "topk_cloest_indice" and _as_near(options, level, value):
            leaf = f"{'window' if level == 0 else 'pooled1'}_index"
            path = f"stage{stage + 1}/block{block + 1}/attention/{leaf}"
            choices[path] = jnp.asarray(value, jnp.int32)
        elif kind == "topk_cloest_coords" and value.shape == expected[kind].shape:
            continue  # follows from the indices
        elif value.shape != expected[kind].shape or not np.array_equal(value, expected[kind]):
            raise ValueError(
                f"{name} {value.shape} is not what the configuration implies "
                f"({expected[kind].shape}): the weights were trained with other windows; "
                "check img_size, window_size, expand_sizes and focal_windows"
            )
    return unknown, choices


def _fitted(options: Mapping) -> tuple[int, int, int]:
    return focal.fit_window(options["grid"], options["window"], options["expand"], options["shift"])


def _window_buffers(options: Mapping, level: int | None) -> Iterator[tuple[str, np.ndarray]]:
    window, expand, shift = _fitted(options)
    if level is None:
        yield "relative_position_index", _displacement_index(window, window)
        if expand:
            yield "valid_ind_rolled", _neighbour_index(window, expand)
        if shift:
            grid = tuple(-(-n // window) * window for n in options["grid"])
            mask = focal.shift_mask((grid[0], grid[1]), window, shift)
            yield "attn_mask", mask.reshape(-1, *mask.shape[3:])
    elif level < options["levels"] - 1:  # the reference counts pooled levels from 0
        size = options["focal_window"] + (1 << level) - 1
        yield "relative_position_index", _displacement_index(window, size)
        if level:
            new = np.zeros((size + (1 << level) - 1,) * 2, bool)
            new[-size:, -size:] = True
            yield "valid_ind_unfold", np.flatnonzero(new)


def _displacement_index(queries: int, keys: int) -> np.ndarray:
    """Returns indices [l, m] into a flat table of queries + keys - 1 a side."""
    away = np.arange(queries)[:, None] - np.arange(keys)[None] + keys - 1
    index = away[:, None, :, None] * (queries + keys - 1) + away[None, :, None, :]
    return index.reshape(queries**2, keys**2)


def _neighbour_index(window: int, expand: int) -> np.ndarray:
    """Returns the kept positions of the four rolled windows, one after the other."""
    near, far = np.arange(window) >= window - expand, np.arange(window) < expand
    groups = [rows[:, None] | columns for rows in (near, far) for columns in (near, far)]
    return np.flatnonzero(np.stack(groups))


def _geometry(options: Mapping, level: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    window, _, _ = _fitted(options)
    height, width = options["grid"]
    tiles = (-(-height // window), -(-width // window))
    return (tiles, (height, width), window) if level == 0 else (tiles, tiles, 1)


def _nearest_buffers(options: Mapping, level: int | None) -> Iterator[tuple[str, np.ndarray]]:
    window, _, shift = _fitted(options)
    inside = np.stack(np.meshgrid(*(np.arange(window) - window // 2,) * 2, indexing="ij"), -1)
    if level is None:
        yield "window_coords", inside
        if shift:  # the reference makes this mask and never uses it
            mask = focal.shift_mask(options["grid"], window, shift)
            yield "attn_mask", mask.reshape(-1, *mask.shape[3:])
    elif level < options["levels"]:
        tiles, cells, factor = _geometry(options, level)
        index, away = nearest(tiles, cells, factor, options["nearest"])
        yield "topk_cloest_indice", index
        scaled = away if level == 0 else away * window
        yield "topk_cloest_coords", scaled[:, None] + inside.reshape(1, -1, 1, 2)


def _as_near(options: Mapping, level: int | None, index: np.ndarray) -> bool:
    """Returns whether the original chose other keys at the same distance as ours."""
    tiles, cells, factor = _geometry(options, level or 0)
    ours, away = nearest(tiles, cells, factor, options["nearest"])
    if index.shape != ours.shape or np.array_equal(index, ours):
        return False
    origin = np.take_along_axis(away, np.zeros((1, 1, 1), int), 1)  # any key fixes the centre
    centre = origin[:, 0] + np.stack(np.divmod(ours[:, 0], cells[1]), -1)
    theirs = centre[:, None] - np.stack(np.divmod(index, cells[1]), -1)
    distance = np.sort((theirs**2).sum(-1), 1)
    return np.array_equal(distance, np.sort((away**2).sum(-1), 1))
