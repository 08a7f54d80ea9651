# SPDX-License-Identifier: Apache-2.0
"""Shapes: grids to sequences and back, to windows and back, and their shifted copies.

Legend: b batch, h w grid, l length, i j windows, y x positions in a window, d width.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, get_args, get_origin

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def check_input(module: nn.Module, x: Any, *forms: str, parameter: str | None = None) -> None:
    """Raises ValueError unless `x` has the axes of one of `forms`, such as ``"b h w d"``.

    A field of the module with a value that its Literal does not have is an error, too.

    Grids without a batch look like sequences to a module that takes both. `parameter` names one
    of the module's arrays that has the axes of the space and one more; it tells them apart.
    """
    for field in dataclasses.fields(module):
        allowed, value = get_args(field.type), getattr(module, field.name)
        if get_origin(field.type) is Literal and value not in allowed:
            raise ValueError(
                f"{type(module).__name__}: {field.name}={value!r}: allowed are {allowed}"
            )
    ranks = {len(form.split()) for form in forms}
    if parameter and module.has_variable("params", parameter):
        ranks &= {module.get_variable("params", parameter).ndim + 1}
    if x.ndim not in ranks:
        wanted = " or ".join(f"[{', '.join(f.split())}]" for f in forms if len(f.split()) in ranks)
        hint = ": put the axis of the batch first, x[None]" if x.ndim + 1 in ranks else ""
        raise ValueError(
            f"{type(module).__name__}: the input has the shape {x.shape}, not {wanted}{hint}"
        )


def grid_to_sequence(x: Shaped[Array, "b *space d"]) -> Shaped[Array, "b l d"]:
    """Flattens the space of a grid, row by row; a sequence stays as it is.

    >>> lg.operators.grid_to_sequence(jnp.ones((2, 4, 3, 8))).shape
    (2, 12, 8)
    """
    return lax.collapse(x, 1, x.ndim - 1)


def sequence_to_grid(
    x: Shaped[Array, "b l d"], space: tuple[int, ...]
) -> Shaped[Array, "b *space d"]:
    """The inverse of `grid_to_sequence` for the given `space`, e.g. ``(h, w)``.

    >>> lg.operators.sequence_to_grid(jnp.ones((2, 12, 8)), (4, 3)).shape
    (2, 4, 3, 8)
    """
    return x.reshape(x.shape[0], *space, x.shape[-1])


def per_channel(vector: Shaped[Array, " d"], x: Array) -> Shaped[Array, "..."]:
    """Reshapes a vector over the last axis to the rank of `x`, for explicit broadcasting."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def pad_to_multiple(x: Shaped[Array, "b h w d"], window: int) -> Shaped[Array, "b H W d"]:
    """Pads with zeros below and to the right, to multiples of `window`.

    >>> lg.operators.pad_to_multiple(jnp.ones((2, 6, 9, 8)), window=4).shape
    (2, 8, 12, 8)
    """
    bottom, right = (-n % window for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))


def window_partition(x: Shaped[Array, "b h w d"], window: int) -> Shaped[Array, "b i j y x d"]:
    """Cuts a grid into windows of window x window; height and width must be multiples of it.

    >>> lg.operators.window_partition(jnp.ones((2, 8, 12, 8)), window=4).shape
    (2, 2, 3, 4, 4, 8)
    """
    b, h, w, d = x.shape
    if h % window or w % window:
        raise ValueError(
            f"window_partition: a {h}x{w} grid is not made of {window}x{window} windows; "
            "pad it first (pad_to_multiple)"
        )
    return x.reshape(b, h // window, window, w // window, window, d).swapaxes(2, 3)


def window_merge(x: Shaped[Array, "b i j y x d"]) -> Shaped[Array, "b h w d"]:
    """The inverse of `window_partition`.

    >>> lg.operators.window_merge(jnp.ones((2, 2, 3, 4, 4, 8))).shape
    (2, 8, 12, 8)
    """
    b, i, j, y, x_, d = x.shape
    return x.swapaxes(2, 3).reshape(b, i * y, j * x_, d)


def shifted(
    x: Shaped[Array, " b *space"],
    window: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Iterator[Shaped[Array, " b *space"]]:
    """Yields, for every offset o of a window by rows, ``x[i + o - before]``, zeros outside.

    The window covers the axes after the batch; those left over (heads, width) come along.

    `padding` is (before, after) per space dimension with ``before + after = window - 1``. These are
    slices of one padded copy: accelerators stream them, where a gather would go element by element.
    """
    space = x.shape[1 : 1 + len(window)]
    rest = ((0, 0),) * (x.ndim - 1 - len(window))
    padded = jnp.pad(x, ((0, 0), *padding, *rest))
    for offset in product(*map(range, window)):
        steps = (slice(o, o + n) for o, n in zip(offset, space, strict=True))
        yield padded[(slice(None), *steps)]
