# SPDX-License-Identifier: Apache-2.0
"""Formulations of `MBConvBlock` in training that `tpu_forms.py` compares. They need no TPU.

Each has the block's parameters and computes its numbers, for the block's default options: stride in
the depthwise convolution, batch norm, squeeze-excite after the norm.

Legend: b batch, d width in, w expanded width; z ``norm(norm(x) @ expand)``, e ``act(z)``, y the
depthwise convolution of e, a ``act(norm(y))``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from localglobal_jax.blocks.convolution import MBConvBlock
from localglobal_jax.blocks.layers import ACTIVATIONS, Shortcut
from localglobal_jax.operators import grids
from localglobal_jax.operators.convolution import depthwise
from localglobal_jax.operators.dense import product
from localglobal_jax.operators.kernels.batch_norm import (
    Affine,
    Moments,
    activate,
    covariance,
    gated_product,
    moments,
    product_moments,
)

NAMES = ("z", "e", "y", "a")
Params = Mapping[str, Any]
Weights = tuple[Array, Array, Array, Array]  # center, kernel and bias of `folded`, window


@dataclasses.dataclass(frozen=True)
class Form:
    """A formulation of a block; `init` and `apply` are those of a flax module.

    Attributes:
      branch: returns the block's output without the shortcut and the moments of its three norms.
      apart: the shortcut's gradient is not fused with the branch's, whose layout it would change.
    """

    block: MBConvBlock
    branch: Callable[[MBConvBlock, Array, Params], tuple[Array, list[Moments]]]
    apart: bool = False

    def init(self, *args: Any, **options: Any) -> Any:
        """Returns the block's variables."""
        return self.block.init(*args, **options)

    def apply(self, variables: Params, x: Array, **_: Any) -> tuple[Array, dict[str, Any]]:
        """Returns the block's output in training and its new statistics."""
        block, params = self.block, variables["params"]
        shortcut = Shortcut(block.features, block.stride, block.pool, dtype=block.dtype)
        y, found = self.branch(block, x.astype(block.dtype), params)
        x = lax.optimization_barrier(x) if self.apart else x
        y += shortcut.apply({"params": params.get("shortcut", {})}, x)
        names = ("norm", "expand_norm", "depthwise_norm")
        stats = {
            name: jax.tree.map(
                lambda old, new: 0.9 * old + 0.1 * new,
                variables["batch_stats"][name],
                {"mean": mean, "var": variance},
            )
            for name, (mean, variance) in zip(names, found, strict=True)
        }
        return y, {"batch_stats": stats}


def affine(params: Params, found: Moments, eps: float) -> Affine:
    """Returns a norm by a batch's moments."""
    mean, variance = found
    return Affine(mean, params["scale"] * lax.rsqrt(variance + eps), params["bias"])


def normed(x: Array, norm: Affine) -> Array:
    """Computes ``norm(x)``."""
    center, scale, offset = (grids.per_channel(v, x) for v in norm)
    return ((x - center) * scale + offset).astype(x.dtype)


def folded(
    x: Array, params: Params, eps: float
) -> tuple[Array, Array, Array, tuple[Moments, Moments]]:
    """Returns z as ``(x - center) @ kernel + bias``: center, kernel and bias, and the moments."""
    mean, spread = covariance(x)
    first = mean, jnp.maximum(jnp.diagonal(spread), 0)
    before, kernel = affine(params["norm"], first, eps), params["expand"]["kernel"]
    second = product_moments(spread, before, kernel)
    after = affine(params["expand_norm"], second, eps)
    offset = jnp.matmul(before.offset, kernel, precision="highest") - after.center
    kernel = (before.scale[:, None] * kernel * after.scale[None, :]).astype(x.dtype)
    return before.center, kernel, offset * after.scale + after.offset, (first, second)


def gate(a: Array, params: Params) -> Array:
    """Returns squeeze-excite's factor of every example and channel, [b, w]."""
    s = a.mean((1, 2))
    for name, act in (("reduce", nn.silu), ("expand", nn.sigmoid)):
        layer = params["squeeze_excite"][name]
        s = product(s, layer["kernel"].astype(a.dtype))
        s = act(s + grids.per_channel(layer["bias"].astype(a.dtype), s))
    return s


def projected(a: Array, factor: Array, params: Params) -> Array:
    """Computes the projection of the gated a."""
    kernel, bias = (params["project"][name].astype(a.dtype) for name in ("kernel", "bias"))
    return gated_product(factor, a, kernel) + grids.per_channel(bias, a)


# ---------------------------------------------------------------------------- what is kept


def keeping(
    *kept: str,
) -> Callable[[MBConvBlock, Array, Params], tuple[Array, list[Moments]]]:
    """Returns the formulation that keeps the named arrays of `NAMES` for the backward pass.

    The others are computed again from the block's input. Statistics and gates are always kept.
    """

    def branch(block: MBConvBlock, x: Array, params: Params) -> tuple[Array, list[Moments]]:
        act, small = ACTIVATIONS[block.activation], partial(checkpoint_name, name="small")

        def pure(x: Array, params: Params) -> tuple[Array, list[Moments]]:
            center, kernel, bias, found = jax.tree.map(small, folded(x, params, block.norm_eps))
            centered = (x - grids.per_channel(center, x)).astype(x.dtype)
            z = product(centered, kernel, preferred_element_type=bias.dtype)
            z = checkpoint_name((z + grids.per_channel(bias, z)).astype(x.dtype), "z")
            e = checkpoint_name(act(z), "e")
            y = depthwise(e, window(params, x), stride=block.stride)
            y = checkpoint_name(y, "y")
            third = jax.tree.map(small, moments(y))
            norm = affine(params["depthwise_norm"], third, block.norm_eps)
            a = checkpoint_name(act(normed(y, norm)), "a")
            return projected(a, small(gate(a, params)), params), [*found, third]

        policy = jax.checkpoint_policies.save_only_these_names("small", *kept)
        return jax.checkpoint(pure, policy=policy)(x, params)

    return branch


def window(params: Params, x: Array) -> Array:
    """Returns the kernel of the depthwise convolution."""
    return params["depthwise"]["kernel"].astype(x.dtype)


# ---------------------------------------------------------------------------- tiles of rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tiles of rows instead of examples, so that all arrays keep the layout of the whole batch.

    A tile also computes the rows around it that its convolution reads, again in the next tile.

    Attributes:
      rows: of y in a tile; they divide its height, and are at least two without a stride.
      channels: of a tile of the expanded width; they divide it.
    """

    rows: int
    channels: int

    def __call__(self, block: MBConvBlock, x: Array, params: Params) -> tuple[Array, list[Moments]]:
        center, kernel, bias, found = folded(x, params, block.norm_eps)
        options, weights = (self, block.activation, block.stride), (center, kernel, bias)
        y, mean, square = expand_rows(options, x, (*weights, window(params, x)))
        third = mean, jnp.maximum(square - jnp.square(mean), 0)
        norm = affine(params["depthwise_norm"], third, block.norm_eps)
        a = activate(y, norm, block.activation)
        return projected(a, gate(a, params), params), [*found, third]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand_rows(
    options: tuple[Rows, Any, int], x: Array, weights: Weights
) -> tuple[Array, Array, Array]:
    """Returns y, its mean and its mean square per channel. `options`: tiles, activation, stride."""
    return _rows_forward(options, x, weights)[0]


def _rows_forward(options: Any, x: Array, weights: Weights) -> Any:
    (tiles, activation, stride), (_, _, bias, window) = options, weights
    (rows, m), (b, height, breadth, _), width = (tiles.rows, tiles.channels), x.shape, len(bias)
    padded = _padded(x, window)

    def over_channels(j: Array, carry: Any, i: Array, part: Array, inside: Array) -> Any:
        y, *sums = carry
        k, c, of_window = (_channels(v, j, m) for v in weights[1:])
        e = jnp.where(inside, ACTIVATIONS[activation](_product(part, k, c)), 0)
        here = _convolve(e, of_window, stride)
        wide, axes = here.astype(bias.dtype), (0, 1, 2)
        found = wide.sum(axes), jnp.square(wide).sum(axes)
        sums = [_add(s, f, j, m) for s, f in zip(sums, found, strict=True)]
        return lax.dynamic_update_slice(y, here, (0, i * rows, 0, j * m)), *sums

    def over_rows(i: Array, carry: Any) -> Any:
        part, inside = _rows(padded, i, options, weights)
        inner = partial(over_channels, i=i, part=part, inside=inside)
        return lax.fori_loop(0, width // m, inner, carry)

    nothing = jnp.zeros(width, bias.dtype)
    shape = (b, -(-height // stride), -(-breadth // stride), width)
    start = (lax.empty(shape, x.dtype), nothing, nothing)
    y, total, square = lax.fori_loop(0, shape[1] // rows, over_rows, start)
    count = y.size // width
    return (y, total / count, square / count), (padded, weights, y)


def _rows_backward(options: Any, saved: Any, given: tuple[Array, ...]) -> Any:
    (tiles, activation, stride), (padded, weights, y) = options, saved
    (_, kernel, bias, window), (g, of_mean, of_square) = weights, given
    rows, m, width, count = tiles.rows, tiles.channels, len(bias), y.size // len(bias)
    step, around = rows * stride, len(window) // 2
    of_mean, of_square = of_mean / count, 2 * of_square / count

    def over_channels(j: Array, carry: Any, i: Array, part: Array, inside: Array) -> Any:
        dx, dkernel, dbias, dwindow = carry
        k, c, of_window = (_channels(v, j, m) for v in weights[1:])
        e, back = jax.vjp(ACTIVATIONS[activation], _product(part, k, c))
        slope = back(jnp.ones_like(e))[0]
        e, slope = (jnp.where(inside, v, 0) for v in (e, slope))
        e, slope = lax.optimization_barrier((e, slope))  # one erf for both
        here, then = (
            lax.dynamic_slice(v, (0, i * rows, 0, j * m), (len(v), rows, v.shape[2], m))
            for v in (g, y)
        )
        mean, square = (grids.per_channel(_channels(v, j, m), here) for v in (of_mean, of_square))
        here = (here + mean + square * then).astype(here.dtype)
        _, back = jax.vjp(partial(_convolve, stride=stride), e, of_window)
        de, dw = back(here)
        dz = (de * slope).astype(e.dtype)
        dz, db = lax.optimization_barrier((dz, dz.astype(bias.dtype).sum((0, 1, 2))))
        dk = jnp.einsum("bhwd,bhwe->de", part, dz, preferred_element_type=bias.dtype)
        return (
            (dx + product(dz, k.T)).astype(dx.dtype),
            _add(dkernel, dk, j, m),
            _add(dbias, db, j, m),
            _add(dwindow, dw, j, m),
        )

    def over_rows(i: Array, carry: Any) -> Any:
        dx, shared, *sums = carry
        part, inside = _rows(padded, i, options, weights)
        inner = partial(over_channels, i=i, part=part, inside=inside)
        found, *sums = lax.fori_loop(0, width // m, inner, (jnp.zeros_like(part), *sums))
        # The last rows are also rows of the next tile, which adds its part.
        mine, rest = lax.slice_in_dim(found, 0, step, axis=1), found[:, step:]
        first = mine[:, : rest.shape[1]] + shared
        mine = jnp.concatenate([first, mine[:, rest.shape[1] :]], 1)
        return lax.dynamic_update_slice_in_dim(dx, mine, i * step, 1), rest, *sums

    sums = [jnp.zeros(v.shape, bias.dtype) for v in (kernel, bias, window)]
    shared = jnp.zeros_like(padded[:, : len(window) - stride])
    start = (lax.empty(padded.shape, padded.dtype), shared, *sums)
    tiles_of = y.shape[1] // rows
    dx, rest, dkernel, dbias, dwindow = lax.fori_loop(0, tiles_of, over_rows, start)
    dx = lax.dynamic_update_slice_in_dim(dx, rest, tiles_of * step, 1)
    dx = dx[:, around : padded.shape[1] - around]
    dcenter = -jnp.matmul(kernel.astype(bias.dtype), dbias, precision="highest")
    return dx, (dcenter, dkernel.astype(kernel.dtype), dbias, dwindow.astype(window.dtype))


expand_rows.defvjp(_rows_forward, _rows_backward)


def _padded(x: Array, window: Array) -> Array:
    around = len(window) // 2
    return jnp.pad(x, ((0, 0), (around, around), (0, 0), (0, 0)))


def _rows(
    padded: Array, i: Array, options: tuple[Rows, Any, int], weights: Weights
) -> tuple[Array, Array]:
    """Returns the rows that tile i of y is computed from, and which of them are no padding."""
    (tiles, _, stride), (center, _, _, window) = options, weights
    size, around = stride * (tiles.rows - 1) + len(window), len(window) // 2
    part = lax.dynamic_slice_in_dim(padded, i * tiles.rows * stride, size, 1)
    part = (part - grids.per_channel(center, part)).astype(part.dtype)
    place = i * tiles.rows * stride - around + jnp.arange(size)
    inside = (place >= 0) & (place < padded.shape[1] - 2 * around)
    return lax.optimization_barrier(part), inside[None, :, None, None]


def _product(x: Array, kernel: Array, bias: Array) -> Array:
    z = product(x, kernel, preferred_element_type=bias.dtype)
    return (z + grids.per_channel(bias, z)).astype(x.dtype)


def _convolve(x: Array, window: Array, stride: int) -> Array:
    around = len(window) // 2
    return depthwise(x, window, stride=stride, padding=((0, 0), (around, around)))


# ---------------------------------------------------------------------------- tiles of examples


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The formulation whose expanded array exists for one tile at a time, in the chip's own memory.

    The statistics of z follow from the covariance of x, so a tile needs no other tile. Forward, a
    loop reads a tile of x and writes a tile of y and its sums; backward, it computes e again.

    Attributes:
      examples: of a tile; they divide the batch.
      channels: of a tile of the expanded width; they divide it.
      second: the second half of the block, from y on, is a loop over examples, too.
    """

    examples: int
    channels: int
    second: bool = False

    def __call__(self, block: MBConvBlock, x: Array, params: Params) -> tuple[Array, list[Moments]]:
        center, kernel, bias, found = folded(x, params, block.norm_eps)
        options, weights = (self, block.activation, block.stride), (center, kernel, bias)
        y, mean, square = expand_depthwise(options, x, (*weights, window(params, x)))
        third = mean, jnp.maximum(square - jnp.square(mean), 0)
        norm = affine(params["depthwise_norm"], third, block.norm_eps)

        def half(y: Array, given: tuple[Affine, Params]) -> Array:
            norm, params = given
            a = activated(block.activation, y, norm)
            return projected(a, gate(a, params), params)

        if self.second:
            return by_examples(half, self.examples, y, (norm, params)), [*found, third]
        a = activate(y, norm, block.activation)
        return projected(a, gate(a, params), params), [*found, third]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand_depthwise(
    options: tuple[Tiles, Any, int],
    x: Array,
    weights: Weights,
) -> tuple[Array, Array, Array]:
    """Returns y, its mean and its mean square per channel. `options`: tiles, activation, stride."""
    (tiles, activation, stride), (center, kernel, bias, window) = options, weights
    n, m, width = tiles.examples, tiles.channels, kernel.shape[1]

    def one(x: Array, kernel: Array, bias: Array, window: Array) -> Array:
        e = ACTIVATIONS[activation](_expanded(x, center, kernel, bias))
        return depthwise(e, window, stride=stride)

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, j = i // (width // m), i % (width // m)
        y, *sums = carry
        given = lax.optimization_barrier(_examples(x, i, n))
        part = one(given, *(_channels(v, j, m) for v in (kernel, bias, window)))
        wide, axes = part.astype(bias.dtype), (0, 1, 2)
        found = wide.sum(axes), jnp.square(wide).sum(axes)
        sums = [_add(s, f, j, m) for s, f in zip(sums, found, strict=True)]
        return lax.dynamic_update_slice(y, part, (i * n, 0, 0, j * m)), *sums

    shape = jax.eval_shape(one, x, kernel, bias, window)
    nothing = jnp.zeros(width, bias.dtype)
    steps = len(x) // n * (width // m)
    y, total, square = lax.fori_loop(
        0, steps, body, (lax.empty(shape.shape, shape.dtype), nothing, nothing)
    )
    count = y.size // width
    return y, total / count, square / count


def _forward(options: Any, x: Array, weights: Weights) -> Any:
    y, mean, square = expand_depthwise(options, x, weights)
    return (y, mean, square), (x, weights, y)


def _backward(options: Any, saved: Any, given: tuple[Array, ...]) -> Any:
    (tiles, activation, stride), (x, weights, y) = options, saved
    (center, kernel, bias, window), (g, of_mean, of_square) = weights, given
    n, m, width = tiles.examples, tiles.channels, kernel.shape[1]
    count = y.size // width
    of_mean, of_square = of_mean / count, 2 * of_square / count

    def over_channels(j: Array, carry: Any, i: Array, part: Array) -> Any:
        dx, dkernel, dbias, dwindow = carry
        k, b, of_window = (_channels(v, j, m) for v in (kernel, bias, window))
        centered = (part - grids.per_channel(center, part)).astype(part.dtype)
        e, back = jax.vjp(ACTIVATIONS[activation], _expanded(part, center, k, b))
        slope = back(jnp.ones_like(e))[0]
        e, slope = lax.optimization_barrier((e, slope))  # one erf for both
        here, then = _cut(g, i, n, j, m), _cut(y, i, n, j, m)
        mean, square = (grids.per_channel(_channels(v, j, m), here) for v in (of_mean, of_square))
        here = (here + mean + square * then).astype(here.dtype)
        _, back = jax.vjp(partial(depthwise, stride=stride), e, of_window)
        de, dw = back(here)
        dz = lax.optimization_barrier((de * slope).astype(e.dtype))
        dk = jnp.einsum("bhwd,bhwe->de", centered, dz, preferred_element_type=bias.dtype)
        return (
            (dx + product(dz, k.T)).astype(dx.dtype),
            _add(dkernel, dk, j, m),
            _add(dbias, dz.astype(bias.dtype).sum((0, 1, 2)), j, m),
            _add(dwindow, dw, j, m),
        )

    def over_examples(i: Array, carry: Any) -> Any:
        dx, *sums = carry
        part = lax.optimization_barrier(_examples(x, i, n))
        inner = partial(over_channels, i=i, part=part)
        start = (jnp.zeros_like(part), *sums)
        found, *sums = inner(0, start) if m == width else lax.fori_loop(0, width // m, inner, start)
        return lax.dynamic_update_slice_in_dim(dx, found, i * n, 0), *sums

    sums = [jnp.zeros(v.shape, bias.dtype) for v in (kernel, bias, window)]
    start = (lax.empty(x.shape, x.dtype), *sums)
    dx, dkernel, dbias, dwindow = lax.fori_loop(0, len(x) // n, over_examples, start)
    dcenter = -jnp.matmul(kernel.astype(bias.dtype), dbias, precision="highest")
    return dx, (dcenter, dkernel.astype(kernel.dtype), dbias, dwindow.astype(window.dtype))


expand_depthwise.defvjp(_forward, _backward)


def _expanded(x: Array, center: Array, kernel: Array, bias: Array) -> Array:
    x = (x - grids.per_channel(center, x)).astype(x.dtype)
    z = product(x, kernel, preferred_element_type=bias.dtype)
    return (z + grids.per_channel(bias, z)).astype(x.dtype)


def _examples(x: Array, i: Array, n: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * n, n, 0)


def _channels(x: Array, j: Array, m: int) -> Array:
    return lax.dynamic_slice_in_dim(x, j * m, m, x.ndim - 1)


def _add(total: Array, x: Array, j: Array, m: int) -> Array:
    new = _channels(total, j, m) + x
    return lax.dynamic_update_slice_in_dim(total, new, j * m, total.ndim - 1)


def _cut(x: Array, i: Array, n: int, j: Array, m: int) -> Array:
    return lax.dynamic_slice(x, (i * n, 0, 0, j * m), (n, *x.shape[1:-1], m))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(activation: Any, x: Array, norm: Affine) -> Array:
    """Computes ``act(norm(x))``; its gradient has two sums instead of three."""
    return ACTIVATIONS[activation](normed(x, norm))


def _activated_backward(activation: Any, saved: tuple[Array, Affine], g: Array) -> Any:
    x, norm = saved
    (g,) = jax.vjp(ACTIVATIONS[activation], normed(x, norm))[1](g)
    wide, axes = g.astype(norm.scale.dtype), (0, 1, 2)
    offset = wide.sum(axes)
    scale = (wide * (x - grids.per_channel(norm.center, x))).sum(axes)
    dx = (g * grids.per_channel(norm.scale, g)).astype(x.dtype)
    return dx, Affine(-norm.scale * offset, scale, offset)


activated.defvjp(
    lambda activation, *args: (activated(activation, *args), args), _activated_backward
)


def by_examples(function: Callable[..., Array], n: int, x: Array, given: Any) -> Array:
    """Computes ``function(x, given)`` for n examples at a time, again in the backward pass."""

    def forward(x: Array, given: Any) -> Array:
        def body(i: Array, out: Array) -> Array:
            part = function(_examples(x, i, n), given)
            return lax.dynamic_update_slice_in_dim(out, part, i * n, 0)

        shape = jax.eval_shape(function, x, given)
        return lax.fori_loop(0, len(x) // n, body, lax.empty(shape.shape, shape.dtype))

    def backward(saved: tuple[Array, Any], g: Array) -> tuple[Array, Any]:
        x, given = saved

        def body(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            dx, total = carry
            part = lax.optimization_barrier(_examples(x, i, n))
            found, more = jax.vjp(function, part, given)[1](_examples(g, i, n))
            dx = lax.dynamic_update_slice_in_dim(dx, found, i * n, 0)
            return dx, jax.tree.map(jnp.add, total, more)

        start = lax.empty(x.shape, x.dtype), jax.tree.map(jnp.zeros_like, given)
        return lax.fori_loop(0, len(x) // n, body, start)

    apply = jax.custom_vjp(forward)
    apply.defvjp(lambda *args: (forward(*args), args), backward)
    return apply(x, given)
