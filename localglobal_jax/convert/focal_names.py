# SPDX-License-Identifier: Apache-2.0
"""Parameters of the authors' Focal Transformers: their names, shapes and layouts beside ours."""

import math
import re
from typing import Any

import numpy as np

RENAMED: tuple[
    tuple[str, Any], ...
] = (  # ours -> the reference's; stages and blocks count from 0 there
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
    """The reference's name and shape of our parameter."""
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
    """The reference's value of our parameter, in our layout."""
    if path.endswith("/conv/kernel") or (re.search(PER_CHANNEL, path) and value.ndim == 4):
        return value.transpose(2, 3, 1, 0).reshape(shape)
    if re.search(HEADS_FIRST, path) or (path.endswith("/kernel") and "/pool" not in path):
        return value.T.reshape(shape)
    return value.reshape(shape)
