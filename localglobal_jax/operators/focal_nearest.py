# SPDX-License-Identifier: Apache-2.0
"""The "fast" focal attention of the authors' second models: each window and its nearest keys.

In place of rolled maps and padded regions, every window attends to the `count` positions of the
map nearest to its centre, and to the `count` pooled windows nearest to it: nothing wraps, nothing
is masked, and near an edge a window sees farther inwards. The bias is a small MLP of the
displacement, so no parameter depends on the size of the map. No paper describes these models;
this follows their published code for two levels.

Legend: b batch, h w grid, i j windows, l queries of a window, m keys, n heads, c head width.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from localglobal_jax.operators import focal, grids
from localglobal_jax.operators.dense import Dense, DenseGeneral, head_width
from localglobal_jax.operators.focal import PoolMethod, WindowPool, attend_windows
from localglobal_jax.operators.reach import Reach

# ---------------------------------------------------------------------------- functions


def nearest(
    tiles: tuple[int, int], cells: tuple[int, int], factor: int, count: int
) -> tuple[Int[np.ndarray, "k m"], Int[np.ndarray, "k m 2"]]:
    """Returns the `count` cells nearest to each of k = i * j windows, and centre minus cell.

    A window is `factor` cells wide. Distances are Euclidean; ties go to the cell that comes first,
    row by row (the reference leaves them to its sorting routine).

    >>> index, displacement = lg.operators.nearest(tiles=(1, 2), cells=(1, 4), factor=2, count=2)
    >>> index.tolist()  # the two cells that are nearest to each of two windows
    [[1, 0], [3, 2]]
    """
    centres = _positions(tiles) * factor + factor // 2
    displacement = centres[:, None] - _positions(cells)[None]
    order = np.argsort((displacement**2).sum(-1), axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(displacement, order[..., None], 1)


def _positions(grid: tuple[int, int]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)


# ---------------------------------------------------------------------------- modules


class NearestFocalAttention(nn.Module):
    """Attention of every window to its nearest positions and its nearest pooled windows.

    Fields as in `FocalAttention`; `count` is the number of keys per level (fewer where the map has
    fewer). The collection "nearest" may hold ``window_index`` and ``pooled1_index`` [i*j, m] that
    replace the choice among equally near keys: converted weights keep the choice they were trained
    with. `grid` is the map they were made for; on any other they are not used.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.NearestFocalAttention(16, heads=2, window=4, count=9)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, module.reach.name
    ((2, 8, 8, 16), 'BOTH')
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    window: int = 7
    count: int = 128
    levels: int = 2
    pool: PoolMethod = "fc"
    qkv_bias: bool = True
    scale: float | None = None
    grid: tuple[int, int] | None = None
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        """Unbounded: on a map of at most `count` positions every key is a neighbour."""
        return Reach(None, windows=True)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        grids.check_input(self, x, "b h w d")
        focal.check(self.window, 0, self.levels, 1, 0)
        if self.levels > 2:
            raise ValueError(
                f"focal, nearest keys: levels {self.levels}; only 1 and 2 are defined "
                "(the reference reads the wrong cells at a third level)"
            )
        features = self.features or x.shape[-1]
        width = self.width or features
        head = (self.heads, head_width(width, self.heads))
        space = x.shape[1:3]
        normal = nn.initializers.normal(0.02)
        qkv = DenseGeneral(
            (3, *head), use_bias=self.qkv_bias, dtype=self.dtype, kernel_init=normal, name="qkv"
        )

        padded = grids.pad_to_multiple(x, self.window)
        fine = qkv(padded).reshape(*padded.shape[:3], 3 * width)
        query = grids.window_partition(fine[..., :width], self.window)
        tiles = (query.shape[1], query.shape[2])
        # Keys come from the map itself: the padding that completes the last windows is never one.
        keys = [(fine[:, : space[0], : space[1], width:], self.window, 1)]
        if self.levels > 1:
            pool = WindowPool(self.pool, self.dtype, name="pool1")
            cells = qkv(pool(focal.coarse_windows(padded, self.window, 1)))
            cells = cells.reshape(*cells.shape[:3], 3 * width)[..., width:]
            keys.append((cells, 1, self.window))

        chosen, biases = [], []
        for name, (cells, factor, scale) in zip(("window", "pooled1"), keys, strict=False):
            size = (cells.shape[1], cells.shape[2])
            index, bias = self._choose(
                name,
                tiles,
                size,
                factor=factor,
                scale=scale,
                hidden=head[1],
                stored=self.grid == space,
            )
            flat = lax.collapse(cells, 1, 3)
            # Near the edges the choice follows no fixed stride: here a gather is right.
            chosen.append(jnp.take(flat, index, axis=1, mode="clip"))
            biases.append(bias)
        joined = jnp.concatenate(chosen, 2)
        joined = joined.reshape(x.shape[0], *tiles, joined.shape[2], 2, *head)
        y = attend_windows(
            query.reshape(x.shape[0], *tiles, self.window**2, *head),
            joined[..., 0, :, :],
            joined[..., 1, :, :],
            jnp.concatenate(biases, -1).reshape(*tiles, self.heads, self.window**2, -1),
            scale=self.scale,
        )
        y = grids.window_merge(y.reshape(*y.shape[:3], self.window, self.window, width))
        y = y[:, : space[0], : space[1]]
        return Dense(features, dtype=self.dtype, kernel_init=normal, name="output")(y)

    def _choose(
        self,
        name: str,
        tiles: tuple[int, int],
        cells: tuple[int, int],
        *,
        factor: int,
        scale: int,
        hidden: int,
        stored: bool,
    ) -> tuple[Array, Array]:
        """Returns indices [i*j, m] of the keys in the flat map, and their biases [i*j, n, l, m]."""
        index, displacement = nearest(tiles, cells, factor, self.count)
        chosen, away = jnp.asarray(index), jnp.asarray(displacement)
        if stored and self.has_variable("nearest", f"{name}_index"):
            chosen = self.get_variable("nearest", f"{name}_index")
            cell = jnp.stack([chosen // cells[1], chosen % cells[1]], -1)
            away = jnp.asarray(_positions(tiles) * factor + factor // 2)[:, None] - cell
        inside = _positions((self.window, self.window)) - self.window // 2
        between = (away * scale)[:, None] + jnp.asarray(inside)[None, :, None]
        normal = nn.initializers.normal(0.02)
        bias = Dense(hidden, kernel_init=normal, name=f"{name}_bias_hidden")(
            between.astype(jnp.float32)
        )
        bias = Dense(self.heads, kernel_init=normal, name=f"{name}_bias_output")(nn.relu(bias))
        return chosen, bias.transpose(0, 3, 1, 2)
