# SPDX-License-Identifier: Apache-2.0
"""Outlook attention (VOLO, arXiv 2106.13112): LOCAL, input-dependent weights without a query.

The centre of each window predicts the attention of all k x k positions of the window to each other.
Legend: b batch, h w grid, i j windows, n heads, c width of a head, q k positions in a window.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.dense import DenseGeneral, head_width
from localglobal_jax.operators.reach import Reach, local

# ---------------------------------------------------------------------------- functions


def outlook(
    value: Float[Array, "b h w n c"], logits: Float[Array, "b i j n q k"], *, stride: int = 1
) -> Float[Array, "b h w n c"]:
    """Unfold, attend inside every window, fold (VOLO, equations 3 to 5).

    ``y = fold(softmax(logits / sqrt(c)) unfold(value))``. Windows of side sqrt(k), an odd number,
    have their centres `stride` apart, the first at position (0, 0), so there are
    ``ceil(h / stride)`` x ``ceil(w / stride)`` of them. Positions outside the grid count as zeros
    that still take their share of the softmax, and overlapping windows are summed, not averaged:
    both as the authors' code has it. The softmax is in float32 at least.

    Raises ValueError if `logits` do not fit the grid.
    """
    h, w, c = value.shape[1], value.shape[2], value.shape[-1]
    window = round(logits.shape[-1] ** 0.5)
    windows = -(-h // stride), -(-w // stride)
    expected = (value.shape[0], *windows, value.shape[3], window**2, window**2)
    if logits.shape != expected or window % 2 == 0:
        raise ValueError(
            f"outlook: logits {logits.shape} do not fit value {value.shape} at stride {stride}; "
            f"with windows of {window}x{window} (an odd side) they must be {expected}"
        )
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    weights = jax.nn.softmax(logits.astype(wide) * c**-0.5, axis=-1).astype(value.dtype)
    seen = unfold(value, windows, window=window, stride=stride)
    answers = jnp.einsum("bijnqk,bijnkc->bijnqc", weights, jnp.stack(seen, axis=-2))
    positions = [answers[..., q, :] for q in range(window**2)]
    return fold(positions, (h, w), window=window, stride=stride)


# The values of all windows at one of their positions are one slice of the padded grid; with the
# grid reshaped to cells of stride x stride, a contiguous one. So unfolding is slices, folding is
# pads and adds, and so are their gradients. There is no gather and no scatter, which XLA does not
# fuse and for which TPUs have no fast path (not measured here). On two CPU cores (28x28, width 192,
# batch 8) indexing took 2.5 times as long forward and 1.2 times with the gradient, and strided
# slices, whose gradients interleave zeros, needed twice the memory.


def unfold(
    grid: Float[Array, "b h w *d"], windows: tuple[int, int], *, window: int, stride: int
) -> list[Float[Array, "b i j *d"]]:
    """Returns the values of all windows at their first position, their second, ..., row by row.

    Window (i, j) is centred at position (i, j) * stride of the grid; outside are zeros.

    >>> grid = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> parts = lg.operators.unfold(grid, (3, 3), window=3, stride=1)
    >>> len(parts), parts[0][0, :, :, 0].tolist()  # the upper left position of every window
    (9, [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 4.0]])
    """
    rows, columns = (n + (window - 1) // stride for n in windows)
    grid = _fit(grid, window // 2, (rows * stride, columns * stride))
    cells = grid.reshape(grid.shape[0], rows, stride, columns, stride, *grid.shape[3:])
    i, j = windows
    parts = []
    for dy, dx in _positions(window):
        (y, y_in), (x, x_in) = divmod(dy, stride), divmod(dx, stride)
        parts.append(cells[:, y : y + i, y_in, x : x + j, x_in])
    return parts


def fold(
    parts: Sequence[Float[Array, "b i j *d"]], space: tuple[int, int], *, window: int, stride: int
) -> Float[Array, "b h w *d"]:
    """The transpose of `unfold`: puts every part back at its position and sums overlaps.

    >>> parts = [jnp.ones((1, 3, 3, 1))] * 9
    >>> lg.operators.fold(parts, (3, 3), window=3, stride=1)[0, :, :, 0].tolist()
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    reach = (window - 1) // stride
    inside: dict[tuple[int, int], Array] = {}
    for (dy, dx), part in zip(_positions(window), parts, strict=True):
        (y, y_in), (x, x_in) = divmod(dy, stride), divmod(dx, stride)
        none = ((0, 0),) * (part.ndim - 3)
        padded = jnp.pad(part, ((0, 0), (y, reach - y), (x, reach - x), *none))
        inside[y_in, x_in] = inside.get((y_in, x_in), 0) + padded
    nothing = jnp.zeros_like(inside[0, 0])  # strides beyond the window leave cells uncovered
    cells = jnp.stack(
        [
            jnp.stack([inside.get((y, x), nothing) for x in range(stride)], axis=3)
            for y in range(stride)
        ],
        axis=2,
    )
    b, rows, _, columns, _, *rest = cells.shape
    grid = cells.reshape(b, rows * stride, columns * stride, *rest)
    return _fit(grid, -(window // 2), space)


def _positions(window: int) -> list[tuple[int, int]]:
    return list(product(range(window), range(window)))


def _fit(x: Array, before: int, space: tuple[int, int]) -> Array:
    """Pads (or, where negative, cuts) the grid: `before` in front, up to `space` in all."""
    padding = [(before, n - before - m, 0) for m, n in zip(x.shape[1:3], space, strict=True)]
    none = (0, 0, 0)
    config = (none, *padding, *(none,) * (x.ndim - 3))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


# ---------------------------------------------------------------------------- modules


class Outlook(nn.Module):
    """Outlook attention over a grid (VOLO, section 3.1 and the authors' code).

    With a stride the centre of a window is the average of its stride x stride cell; a cell that
    the border cuts is averaged over the positions it has.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads.
      window: side of a window, an odd number from 3.
      stride: distance of two windows; 2 makes a quarter of them (all of the paper's models).
      value_bias: of the value projection; the other two always have one.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.Outlook(32, heads=4)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, str(module.reach)
    ((2, 8, 8, 32), 'LOCAL 2')
    """

    features: int | None = None
    heads: int = 6
    window: int = 3
    stride: int = 2
    value_bias: bool = False
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        """A value moves across a whole window; a weight, from the far end of its cell."""
        half = self.window // 2
        return local(half + max(half, self.stride - 1))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        grids.check_input(self, x, "b h w d")
        features = self.features or x.shape[-1]
        if self.window < 3 or self.window % 2 == 0 or self.stride < 1:
            raise ValueError(
                f"outlook: window={self.window}, stride={self.stride}; "
                "the window must be odd and at least 3, the stride at least 1"
            )
        dense = partial(DenseGeneral, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        shape = (self.heads, head_width(features, self.heads))
        value = dense(shape, use_bias=self.value_bias, name="value")(x)
        cell = (self.stride, self.stride)
        padding = tuple((0, -n % self.stride) for n in x.shape[1:3])
        centres = nn.avg_pool(x, cell, cell, padding, count_include_pad=False)
        logits = dense((self.heads, self.window**2, self.window**2), name="weights")(centres)
        y = outlook(value, logits, stride=self.stride)
        return dense(features, name="output")(y.reshape(*x.shape[:-1], features))
