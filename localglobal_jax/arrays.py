# SPDX-License-Identifier: Apache-2.0
"""Shapes: grids to sequences and back. b batch, h w grid, l length, d width."""

from jaxtyping import Array, Shaped


def grid_to_sequence(x: Shaped[Array, "b *space d"]) -> Shaped[Array, "b l d"]:
    """Flattens the space of a grid, row by row; a sequence stays as it is."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def sequence_to_grid(
    x: Shaped[Array, "b l d"], space: tuple[int, ...]
) -> Shaped[Array, "b *space d"]:
    """The inverse of `grid_to_sequence` for the given `space`, e.g. ``(h, w)``."""
    return x.reshape(x.shape[0], *space, x.shape[-1])


def per_channel(vector: Shaped[Array, "d"], x: Array) -> Shaped[Array, "..."]:
    """A vector over the last axis with the rank of `x`: broadcasting that is written down."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
