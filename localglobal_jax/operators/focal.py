# SPDX-License-Identifier: Apache-2.0
"""Focal self-attention: near keys one by one, far keys as pooled summaries (arXiv 2107.00641).

A query attends to its own window, to the neighbours of that window, and per further level to a
region of pooled windows around it; everything is one softmax. It computes what the authors'
published code does, not an idealisation of it:

- Neighbours come in four groups, each the map rolled towards a corner by `expand`. The groups
  overlap, so some neighbours are keys twice, each time with a bias of its own, and count twice.
- Rolling wraps around: a window at the edge has neighbours from the opposite edge.
- A grid whose sides are not multiples of the window is padded with zeros; their keys stay unmasked.
- Pooled windows outside the map have zero keys and values and a bias of -100.

Legend: b batch, h w grid, i j windows, l queries of a window, m keys, n heads, c head width.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.attention import attend
from localglobal_jax.operators.dense import Dense, DenseGeneral, head_width
from localglobal_jax.operators.reach import Reach

PoolMethod = Literal["fc", "conv", "mean", "max"]


def attend_windows(
    query: Float[Array, "b i j l n c"],
    key: Float[Array, "b i j m n c"],
    value: Float[Array, "b i j m n c"],
    bias: Float[Array, "#i #j n l m"],
    mask: Float[np.ndarray, "i j 1 #l m"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "b i j l n c"]:
    """Softmax attention inside each window, in float32 at least.

    `bias` and `mask` are added to the logits after `scale`, by default 1 / sqrt(c).

    >>> query = jnp.ones((1, 2, 2, 16, 4, 8))  # 2 x 2 windows of 16 queries, 4 heads of width 8
    >>> key = value = jnp.ones((1, 2, 2, 25, 4, 8))
    >>> bias = jnp.zeros((1, 1, 4, 16, 25))
    >>> jax.eval_shape(lg.operators.attend_windows, query, key, value, bias).shape
    (1, 2, 2, 16, 4, 8)
    """
    if scale:
        query = query * (scale * query.shape[-1] ** 0.5)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    bias = bias.astype(wide) + (0.0 if mask is None else mask)
    return attend(query, key, value, bias=bias)


class WindowPool(nn.Module):
    """Pools each window to one vector: "fc" weighs its positions, alike for all channels.

    "conv" weighs per channel; "mean" and "max" have no parameters.

    >>> windows = jnp.ones((2, 4, 4, 7, 7, 16))  # 4 x 4 windows of 7 x 7 positions
    >>> module = lg.operators.WindowPool("fc")
    >>> jax.eval_shape(module.init_with_output, jax.random.key(0), windows)[0].shape
    (2, 4, 4, 16)
    """

    method: PoolMethod = "fc"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b i j y x d"]) -> Float[Array, "b i j d"]:
        if self.method == "mean":
            return x.mean((3, 4))
        if self.method == "max":
            return x.max((3, 4))
        if self.method not in get_args(PoolMethod):
            raise ValueError(f"focal pool {self.method!r}: allowed are {get_args(PoolMethod)}")
        per_channel = (x.shape[-1],) if self.method == "conv" else ()
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (*x.shape[3:5], *per_channel), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, per_channel, jnp.float32)
        weights = "yxd" if per_channel else "yx"
        y = jnp.einsum(f"bijyxd,{weights}->bijd", x, kernel.astype(self.dtype))
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


class FocalAttention(nn.Module):
    """Focal self-attention over a grid of any size, padded to multiples of the window.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of all together; None: `features`.
      window: side of a window. `expand`: how far its neighbours reach; 0: no neighbours.
      levels: 1 is the fine level alone; each further one pools windows of half the size.
      focal_window: pooled windows seen at level 1, per side; odd.
      shift: cyclic shift of the windows (Swin); 0: none.
      pool: "fc" (the paper), "conv", "mean" or "max".
      qkv_bias: of the query, key and value projection.
      scale: of the logits; None: 1 / sqrt(head width).
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.FocalAttention(16, heads=2, window=4, expand=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, module.reach.name
    ((2, 8, 8, 16), 'BOTH')
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    window: int = 7
    expand: int = 3
    levels: int = 2
    focal_window: int = 3
    shift: int = 0
    pool: PoolMethod = "fc"
    qkv_bias: bool = True
    scale: float | None = None
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return Reach(radius(self.window, self.expand, self.levels, self.focal_window), windows=True)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        grids.check_input(self, x, "b h w d")
        check(self.window, self.expand, self.levels, self.focal_window, self.shift)
        features = self.features or x.shape[-1]
        width = self.width or features
        head, area = (self.heads, head_width(width, self.heads)), self.window**2
        space = x.shape[1:3]
        qkv = DenseGeneral(
            (3, *head),
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="qkv",
        )

        x = jnp.roll(grids.pad_to_multiple(x, self.window), (-self.shift,) * 2, (1, 2))
        fine = qkv(x).reshape(*x.shape[:3], 3 * width)
        windows = grids.window_partition(fine, self.window)
        windows = windows.reshape(*windows.shape[:3], area, 3 * width)
        keys = [windows[..., width:]]
        if self.expand:
            keys.append(neighbours(fine[..., width:], self.window, self.expand))
        for level in range(1, self.levels):
            pool = WindowPool(self.pool, self.dtype, name=f"pool{level}")
            cells = pool(coarse_windows(x, self.window, level))
            # The same projection as the fine level's; its queries are not needed.
            cells = qkv(cells).reshape(*cells.shape[:3], 3 * width)[..., width:]
            keys.append(surroundings(cells, self.focal_window, level))

        joined = jnp.concatenate(keys, 3)
        y = attend_windows(
            windows[..., :width].reshape(*windows.shape[:4], *head),
            joined[..., :width].reshape(*joined.shape[:4], *head),
            joined[..., width:].reshape(*joined.shape[:4], *head),
            self._bias()[None, None],
            key_mask(
                (windows.shape[1], windows.shape[2]),
                self.window,
                self.expand,
                self.levels,
                focal_window=self.focal_window,
                shift=self.shift,
            ),
            scale=self.scale,
        )
        y = y.reshape(*y.shape[:3], self.window, self.window, width)
        y = jnp.roll(grids.window_merge(y), (self.shift,) * 2, (1, 2))
        return Dense(
            features,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="output",
        )(y[:, : space[0], : space[1]])

    def _bias(self) -> Float[Array, "n l m"]:
        """Returns the biases of the keys: own window, neighbours, then every pooled level."""
        window, heads, normal = self.window, self.heads, nn.initializers.normal(0.02)
        side = 2 * window - 1
        table = self.param("window_bias", nn.initializers.zeros, (side, side, heads), jnp.float32)
        biases = [displacement_bias(table, window, window)]
        if self.expand:
            count = 4 * window**2 - 4 * (window - self.expand) ** 2
            biases.append(
                self.param("neighbour_bias", normal, (heads, window**2, count), jnp.float32)
            )
        for level in range(1, self.levels):
            size = self.focal_window + (1 << (level - 1)) - 1
            side = window + size - 1
            table = self.param(f"pooled{level}_bias", normal, (side, side, heads), jnp.float32)
            biases.append(displacement_bias(table, window, size))
        return jnp.concatenate(biases, -1)


OUTSIDE = -100.0  # the authors' finite "minus infinity"; it is added, so large logits survive it


def check(window: int, expand: int, levels: int, focal_window: int, shift: int) -> None:
    """Raises ValueError if the windows do not fit each other."""
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
    """Shrinks a window that fills the grid to it, without neighbours (the authors' rule)."""
    if min(grid) <= window:
        return min(grid), 0, 0
    return window, expand, shift


def neighbours(x: Float[Array, "b h w d"], window: int, expand: int) -> Float[Array, "b i j m d"]:
    """Returns the positions around each window, up to `expand` away; edges wrap around.

    Four groups: the window moved by (+e, +e), (+e, -e), (-e, +e), (-e, -e), row by row, without the
    positions of the window itself: ``4 w^2 - 4 (w - e)^2`` positions in all.
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
                groups.append(lax.collapse(part, 3, 5))
    return jnp.concatenate(groups, 3)


def coarse_windows(
    x: Float[Array, "b h w d"], window: int, level: int
) -> Float[Array, "b i j y x d"]:
    """Splits the map into the windows that level 1, 2, .. pools: ``window // 2^(level - 1)``.

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
    """Returns the pooled cells of each window: its own 2^(level - 1) a side, and a margin.

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
    """Returns the mask that is added to the logits of every window: [i, j, 1, 1 or l, m]."""
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
    """Returns the distance of the farthest key in rows or columns, without wrap-around.

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
