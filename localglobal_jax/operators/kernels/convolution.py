# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution as shifted sums, with derivatives by hand; dynamic convolution as bands.

Both are for CPU; `strided` is for GPU. The equations are in `operators.convolution`. Legend: b
batch, n heads, d width, l length, k positions of a window.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from localglobal_jax.operators import grids

Padding = Sequence[tuple[int, int]]
BLOCK = 32  # positions whose dynamic kernels make one matrix


def depthwise(x: Array, kernel: Array, *, stride: int, padding: Padding) -> Array:
    """Computes `operators.convolution.depthwise` as a sum of shifted products."""
    window, space = kernel.shape[:-1], x.shape[1:-1]
    sizes = tuple(zip(space, window, padding, strict=True))
    out = [(n + before + after - k) // stride + 1 for n, k, (before, after) in sizes]
    # Every stride-th row and column, from each start, as an array of its own, [s.., b, ..., d]:
    # then all offsets of the window are slices without a stride. XLA computes the input of strided
    # slices again for each of them.
    whole = [(before, -(n + before + after) % stride + after) for n, _, (before, after) in sizes]
    padded = jnp.pad(x, ((0, 0), *whole, (0, 0)))
    cut = [part for n in padded.shape[1:-1] for part in (n // stride, stride)]
    parts = padded.reshape(x.shape[0], *cut, x.shape[-1])
    rank = len(space)
    parts = jnp.moveaxis(parts, [2 * i + 2 for i in range(rank)], range(rank))
    return _sum_of_shifts(parts, kernel, tuple(out))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_of_shifts(parts: Array, kernel: Array, out: tuple[int, ...]) -> Array:
    """``sum_o parts[o % s, :, o // s : o // s + out] kernel[o]`` over all offsets of the window."""
    terms = (
        _slice(parts[which], first, out) * grids.per_channel(kernel[offset], parts[which])
        for offset, which, first in _offsets(kernel, parts.shape[0])
    )
    return functools.reduce(operator.add, terms)


def _sum_of_shifts_backward(
    out: tuple[int, ...], saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    """Sums slices. Autodiff sums padded arrays instead, whose elements test every offset for being
    inside: 1.7 times the time with a stride of 2, 1.1 times without.
    """
    parts, kernel = saved
    rank, stride = len(out), parts.shape[0]
    most = [-(-k // stride) - 1 for k in kernel.shape[:-1]]
    size = parts.shape[rank + 1 : -1]
    around = [(m, n - o) for m, n, o in zip(most, size, out, strict=True)]
    padded = jnp.pad(g, ((0, 0), *around, (0, 0)))
    sums: dict[tuple[int, ...], Array] = {}
    of_kernel = []
    for offset, which, first in _offsets(kernel, stride):
        back = tuple(m - f for m, f in zip(most, first, strict=True))
        term = _slice(padded, back, size) * grids.per_channel(kernel[offset], g)
        sums[which] = sums[which] + term if which in sums else term
        of_kernel.append((_slice(parts[which], first, out) * g).sum(tuple(range(g.ndim - 1))))
    every = product(range(stride), repeat=rank)
    of_parts = jnp.stack(
        [sums.get(which, jnp.zeros(parts.shape[rank:], g.dtype)) for which in every]
    )
    return of_parts.reshape(parts.shape), jnp.stack(of_kernel).reshape(kernel.shape)


_sum_of_shifts.defvjp(
    lambda parts, kernel, out: (_sum_of_shifts(parts, kernel, out), (parts, kernel)),
    _sum_of_shifts_backward,
)


def _offsets(kernel: Array, stride: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields every offset of a window, the part that holds it, and its place there."""
    for offset in product(*map(range, kernel.shape[:-1])):
        first, which = zip(*(divmod(o, stride) for o in offset), strict=True)
        yield offset, which, first


def _slice(x: Array, first: Sequence[int], size: Sequence[int]) -> Array:
    steps = (slice(f, f + n) for f, n in zip(first, size, strict=True))
    return x[(slice(None), *steps)]


def strided(grouped: Callable[[Array, Array], Array], stride: int, padding: Padding) -> Any:
    """Returns the convolution `grouped` with the gradient of its input as slices, for GPU.

    XLA on GPU computes that gradient as a convolution of the output's gradient with zeros between
    its elements, which it writes to memory first. Here each position of a stride x stride cell is a
    sum of the few slices of the output's gradient that reach it, and all of them are one kernel.
    """

    def backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        x, kernel = saved
        (of_kernel,) = jax.vjp(lambda kernel: grouped(x, kernel), kernel)[1](g)
        return _input_gradient(g, kernel, stride, padding, x.shape[1:-1]), of_kernel

    convolve = jax.custom_vjp(grouped)
    convolve.defvjp(lambda *args: (grouped(*args), args), backward)
    return convolve


def _input_gradient(
    g: Array, kernel: Array, stride: int, padding: Padding, space: tuple[int, ...]
) -> Array:
    """Returns ``dx[u] = sum g[i] kernel[o]`` over all i, o with ``i stride + o = u + before``.

    Positions u = m stride + r with the same r are the same sum over o, of ``g[m + (r + before - o)
    / stride]``: one array per r, then interleaved.
    """
    window, rank = kernel.shape[:-1], len(space)
    cells = [-(-n // stride) for n in space]
    # (r + before - o) / stride lies between -(k - 1) // stride and (stride - 1 + before) // stride.
    front = [(k - 1) // stride for k in window]
    back = [
        max(0, n + (stride - 1 + before) // stride - size)
        for n, (before, _), size in zip(cells, padding, g.shape[1:-1], strict=True)
    ]
    padded = jnp.pad(g, ((0, 0), *zip(front, back, strict=True), (0, 0)))
    terms: dict[tuple[int, ...], Array] = {}
    for offset in product(*map(range, window)):
        which = tuple((o - before) % stride for o, (before, _) in zip(offset, padding, strict=True))
        first = [
            ahead + (r + before - o) // stride
            for ahead, r, o, (before, _) in zip(front, which, offset, padding, strict=True)
        ]
        term = _slice(padded, first, cells) * grids.per_channel(kernel[offset], g)
        terms[which] = terms[which] + term if which in terms else term
    nothing = jnp.zeros((g.shape[0], *cells, g.shape[-1]), g.dtype)
    parts = [terms.get(which, nothing) for which in product(range(stride), repeat=rank)]
    grid = jnp.stack(parts).reshape((stride,) * rank + nothing.shape)
    # [s.., b, m.., d] -> [b, m, s, .., d]
    order = [rank, *(axis for i in range(rank) for axis in (rank + 1 + i, i)), 2 * rank + 1]
    whole = grid.transpose(order).reshape(g.shape[0], *(n * stride for n in cells), g.shape[-1])
    return _slice(whole, (0,) * rank, space)


def dynamic(x: Array, kernel: Array, *, before: int) -> Array:
    """Computes `operators.convolution.dynamic` of a sequence as products with band matrices.

    A block of l positions reads l + k - 1 positions of x. Kernels [l, k] padded by l zeros each and
    reshaped to rows of l + k - 1 move by one from row to row: the band. A NaN under one of its
    zeros spreads. `before`: positions of padding in front.
    """
    (b, length, d), (n, k) = x.shape, kernel.shape[-2:]
    block = max(1, min(BLOCK, length))
    wide, rest = block + k - 1, -length % block
    blocks, more = (length + rest) // block, -(-(k - 1) // block)
    padded = jnp.pad(x, ((0, 0), (before, more * block - before + rest), (0, 0)))
    cut = padded.reshape(b, blocks + more, block, n, d // n)
    seen = jnp.concatenate([cut[:, i : i + blocks] for i in range(more + 1)], 2)
    band = jnp.pad(kernel, ((0, 0), (0, rest), (0, 0), (0, block)))
    band = band.reshape(b, blocks, block, n, k + block).swapaxes(2, 3)
    band = lax.collapse(band, 3)[..., : block * wide].reshape(b, blocks, n, block, wide)
    y = jnp.einsum("binlm,bimnc->bilnc", band, seen[:, :, :wide])
    return y.reshape(b, blocks * block, d)[:, :length]
