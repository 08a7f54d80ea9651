# SPDX-License-Identifier: Apache-2.0
"""Which keys the windows of focal attention see, by slices and rolls of the map (arXiv 2107.00641).

Pure functions; what they are put together to, and where the published code departs from the paper,
is told in `operators/focal.py`. Levels count from 1, the first pooled one; 0 is the fine level.

Legend: b batch, h w grid, p q pooled cells, i j windows, l queries of a window, m keys, n heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from localglobal_jax.operators import grids

OUTSIDE = -100.0  # the authors' finite "minus infinity"; it is added, so large logits survive it


def check(window: int, expand: int, levels: int, focal_window: int, shift: int) -> None:
    """Raises ValueError for windows that do not fit each other."""
    if not 0 <= expand <= window:
        raise ValueError(f"focal: expand {expand} must lie between 0 and the window, {window}")
    if not 0 <= shift < window:
        raise ValueError(
            f"focal: shift {shift} must lie between 0 and the window - 1, {window - 1}"
        )
    if levels < 1 or (window >> max(levels - 2, 0)) < 1:
        raise ValueError(
            f"focal: {levels} levels with window {window}; at least 1, and every further level "
            f"halves the window, so at most {window.bit_length() + 1}"
        )
    if focal_window < 1 or focal_window % 2 == 0:
        raise ValueError(f"focal: focal_window {focal_window} must be odd, so that it has a middle")


def fit_window(grid: tuple[int, int], window: int, expand: int, shift: int) -> tuple[int, int, int]:
    """The authors' rule: a window that fills the grid shrinks to it and needs no neighbours."""
    if min(grid) <= window:
        return min(grid), 0, 0
    return window, expand, shift


def neighbours(x: Float[Array, "b h w d"], window: int, expand: int) -> Float[Array, "b i j m d"]:
    """Positions around each window, up to `expand` away, corners included; edges wrap around.

    Four groups, from (+e, +e), (+e, -e), (-e, +e), (-e, -e) away; of each, row by row, what the
    window itself does not have: ``4 w^2 - 4 (w - e)^2`` positions in all.
    """
    keep, every = window - expand, slice(None)
    groups = []
    for dy in (expand, -expand):
        for dx in (expand, -expand):
            # What is new after a roll is an L. Row by row an L is two rectangles, so slices do, and
            # the index list (a gather forward, a scatter backward) is never needed.
            tiles = grids.window_partition(jnp.roll(x, (-dy, -dx), (1, 2)), window)
            side = slice(keep, None) if dx > 0 else slice(0, expand)
            rectangles = (
                ((slice(0, keep), side), (slice(keep, None), every))
                if dy > 0
                else ((slice(0, expand), every), (slice(expand, None), side))
            )
            for rows, columns in rectangles:
                part = tiles[:, :, :, rows, columns]
                groups.append(part.reshape(*part.shape[:3], -1, part.shape[-1]))
    return jnp.concatenate(groups, 3)


def coarse_windows(
    x: Float[Array, "b h w d"], window: int, level: int
) -> Float[Array, "b i j y x d"]:
    """What level 1, 2, .. pools: the map in windows of ``window // 2^(level - 1)``.

    There are 2^(level - 1) of them per window and side. Where they do not fill the map, it is
    trimmed around its centre.
    """
    small = window >> (level - 1)
    cells = [(n // window) << (level - 1) for n in x.shape[1:3]]
    top, left = ((n - m * small) // 2 for n, m in zip(x.shape[1:3], cells, strict=True))
    trimmed = x[:, top : top + cells[0] * small, left : left + cells[1] * small]
    return grids.window_partition(trimmed, small)


def surroundings(
    x: Float[Array, "b p q d"], focal_window: int, level: int
) -> Float[Array, "b i j m d"]:
    """The pooled cells that each window sees: its own 2^(level - 1) a side, and a margin.

    The margin is ``focal_window // 2`` cells on every side; outside the map there are zeros.
    Row by row, ``(focal_window + 2^(level - 1) - 1)^2`` cells.
    """
    stride = 1 << (level - 1)
    size, margin = focal_window + stride - 1, focal_window // 2
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    # Rows first, then columns: 2 x size strided slices instead of size^2, and no gather.
    for axis in (1, 3):
        last = x.shape[axis] - size
        picks = (jax.lax.slice_in_dim(x, o, o + last + 1, stride, axis=axis) for o in range(size))
        x = jnp.stack(list(picks), axis + 1)
    b, i, rows, j, columns, d = x.shape
    return x.swapaxes(2, 3).reshape(b, i, j, rows * columns, d)


def displacement_bias(
    table: Float[Array, "s s n"], queries: int, keys: int
) -> Float[Array, "n l m"]:
    """``table[qy - ky + keys - 1, qx - kx + keys - 1]`` for two squares of positions.

    `table` has ``queries + keys - 1`` entries a side. Each query row reads a run of the table
    backwards, so this is slices again: looking up one by one would scatter in the backward pass.
    """
    for axis in (0, 2):
        runs = (
            jnp.flip(jax.lax.slice_in_dim(table, q, q + keys, axis=axis), axis)
            for q in range(queries)
        )
        table = jnp.stack(list(runs), axis)
    return table.transpose(4, 0, 2, 1, 3).reshape(-1, queries**2, keys**2)


def outside_mask(cells: tuple[int, int], focal_window: int, level: int) -> np.ndarray:
    """-100 for pooled cells outside the map, else 0: [i, j, 1, 1, m], to be added to the logits."""
    stride = 1 << (level - 1)
    first = [np.arange(0, n, stride) - focal_window // 2 for n in cells]
    seen = [start[:, None] + np.arange(focal_window + stride - 1) for start in first]
    rows, columns = ((s >= 0) & (s < n) for s, n in zip(seen, cells, strict=True))
    inside = rows[:, None, :, None] & columns[None, :, None, :]
    inside = inside.reshape(*inside.shape[:2], 1, 1, -1)
    return np.where(inside, 0.0, OUTSIDE).astype(np.float32)


def shift_mask(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """-100 between positions that only the cyclic shift brought together: [i, j, 1, l, l].

    As in Swin (arXiv 2103.14030, figure 4); it concerns the keys of a query's own window alone.
    """
    rows, columns = (np.digitize(np.arange(n), (n - window, n - shift)) for n in grid)
    tiles = (3 * rows[:, None] + columns).reshape(grid[0] // window, window, -1, window)
    region = tiles.swapaxes(1, 2).reshape(*tiles.shape[0:3:2], 1, -1)
    apart = region[..., :, None] != region[..., None, :]
    return np.where(apart, OUTSIDE, 0.0).astype(np.float32)


def key_mask(
    tiles: tuple[int, int],
    window: int,
    expand: int,
    levels: int,
    *,
    focal_window: int,
    shift: int,
) -> np.ndarray:
    """What is added to the logits of every window beside the biases: [i, j, 1, 1 or l, m]."""
    area = window**2
    groups = [np.zeros((*tiles, 1, 1, area + 4 * (area - (window - expand) ** 2)), np.float32)]
    for level in range(1, levels):
        cells = tiles[0] << (level - 1), tiles[1] << (level - 1)
        groups.append(outside_mask(cells, focal_window, level))
    mask = np.concatenate(groups, -1)
    if shift:
        mask = np.repeat(mask, area, axis=3)
        mask[..., :area] += shift_mask((tiles[0] * window, tiles[1] * window), window, shift)
    return mask


def radius(window: int, expand: int, levels: int, focal_window: int) -> int | None:
    """How many rows or columns away a key can be, not counting wrap-around.

    None where some level's windows do not divide the window (7 has no halves): those levels are
    trimmed around the map's centre and drift away from the window, the farther the larger the map.
    """
    farthest = window - 1 + expand
    for level in range(1, levels):
        small = window >> (level - 1)
        if small << (level - 1) != window:
            return None
        farthest = max(farthest, window - 1 + focal_window // 2 * small)
    return farthest
