# SPDX-License-Identifier: Apache-2.0
"""The index tables and masks in a Focal state dict: derived values, checked and then dropped.

A table that differs from what the configuration implies means that the weights were trained with
other windows, so silence would give wrong logits. One kind cannot be derived: which of several
equally near keys the "fast" models chose. Those are handed on.
"""

import re
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from localglobal_jax.models.focal import FocalTransformer
from localglobal_jax.operators import focal_windows as windows
from localglobal_jax.operators.focal_nearest import nearest

NAME = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(?:attn\.)?([a-z_]+?)(?:_(\d+))?$")


def check(
    module: FocalTransformer, entries: Mapping[str, np.ndarray]
) -> tuple[list[str], dict[str, Array]]:
    """Names that are no buffer of `module`, and the choices among equally near keys.

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
    return windows.fit_window(
        options["grid"], options["window"], options["expand"], options["shift"]
    )


def _window_buffers(options: Mapping, level: int | None) -> Iterator[tuple[str, np.ndarray]]:
    window, expand, shift = _fitted(options)
    if level is None:
        yield "relative_position_index", _displacement_index(window, window)
        if expand:
            yield "valid_ind_rolled", _neighbour_index(window, expand)
        if shift:
            grid = tuple(-(-n // window) * window for n in options["grid"])
            mask = windows.shift_mask((grid[0], grid[1]), window, shift)
            yield "attn_mask", mask.reshape(-1, *mask.shape[3:])
    elif level < options["levels"] - 1:  # the reference counts pooled levels from 0
        size = options["focal_window"] + (1 << level) - 1
        yield "relative_position_index", _displacement_index(window, size)
        if level:
            new = np.zeros((size + (1 << level) - 1,) * 2, bool)
            new[-size:, -size:] = True
            yield "valid_ind_unfold", np.flatnonzero(new)


def _displacement_index(queries: int, keys: int) -> np.ndarray:
    """[l, m] into a flat table of queries + keys - 1 a side."""
    away = np.arange(queries)[:, None] - np.arange(keys)[None] + keys - 1
    index = away[:, None, :, None] * (queries + keys - 1) + away[None, :, None, :]
    return index.reshape(queries**2, keys**2)


def _neighbour_index(window: int, expand: int) -> np.ndarray:
    """Of the four rolled windows one after the other, the positions that are kept."""
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
            mask = windows.shift_mask(options["grid"], window, shift)
            yield "attn_mask", mask.reshape(-1, *mask.shape[3:])
    elif level < options["levels"]:
        tiles, cells, factor = _geometry(options, level)
        index, away = nearest(tiles, cells, factor, options["nearest"])
        yield "topk_cloest_indice", index
        scaled = away if level == 0 else away * window
        yield "topk_cloest_coords", scaled[:, None] + inside.reshape(1, -1, 1, 2)


def _as_near(options: Mapping, level: int | None, index: np.ndarray) -> bool:
    """Whether other keys were chosen, no nearer and no farther than ours."""
    tiles, cells, factor = _geometry(options, level or 0)
    ours, away = nearest(tiles, cells, factor, options["nearest"])
    if index.shape != ours.shape or np.array_equal(index, ours):
        return False
    own = np.take_along_axis(away, np.zeros((1, 1, 1), int), 1)  # any key fixes the centre
    centre = own[:, 0] + np.stack(np.divmod(ours[:, 0], cells[1]), -1)
    theirs = centre[:, None] - np.stack(np.divmod(index, cells[1]), -1)
    distance = np.sort((theirs**2).sum(-1), 1)
    return np.array_equal(distance, np.sort((away**2).sum(-1), 1))
