# SPDX-License-Identifier: Apache-2.0
"""Convolution: LOCAL, translation-equivariant; weights static, or dynamic: made at each position.

A convolution that mixes channels is `flax.linen.Conv` with explicit padding, a 1x1 convolution is
`flax.linen.Dense`. What is left, and written here, is the depthwise one: each channel by itself.
"""

import math
from collections.abc import Sequence
from itertools import product

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax import arrays, parallel
from localglobal_jax.reach import Reach, local

Padding = Sequence[tuple[int, int]]


def same_padding(window: Sequence[int]) -> Padding:
    """k // 2 on both sides, as PyTorch pads. Flax's "SAME" pads (0, 1) at stride 2 instead."""
    if not all(k % 2 for k in window):
        raise ValueError(f"window {tuple(window)}: padding it evenly needs odd sizes")
    return tuple((k // 2, k // 2) for k in window)


def depthwise(
    x: Float[Array, "b *space d"],
    kernel: Float[Array, "*window _"],
    *,
    stride: int = 1,
    padding: Padding | None = None,
) -> Float[Array, "b *out d"]:
    """Depthwise convolution over any number of space dimensions.

    ``y[i, c] = sum_j kernel[j, c] x[i * stride + j - padding, c]``; `padding` is (before, after)
    per space dimension, by default k // 2 on both sides.
    """
    if kernel.ndim != x.ndim - 1 or kernel.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"depthwise: kernel {kernel.shape} does not fit x {x.shape}; "
            f"it must be [*window, {x.shape[-1]}] with {x.ndim - 2} window dimension(s)"
        )
    padding = same_padding(kernel.shape[:-1]) if padding is None else padding

    def shifted(x: Array, kernel: Array) -> Array:
        return _depthwise_shifted(x, kernel, stride, padding)

    def grouped(x: Array, kernel: Array) -> Array:
        return _depthwise_grouped(x, kernel, stride, padding)

    # XLA's grouped convolution on CPU is several times slower than shifted multiplies, forward and
    # backward; on TPU and GPU the shifts' backward pass needs 6 to 9 times the temporary memory.
    return parallel.by_platform(x, kernel, cpu=shifted, default=grouped)


def _depthwise_shifted(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    window, space = kernel.shape[:-1], x.shape[1:-1]
    sizes = tuple(zip(space, window, padding, strict=True))
    out = [(n + before + after - k) // stride + 1 for n, k, (before, after) in sizes]
    # Every stride-th row and column, from each beginning, as arrays of their own, [s.., b, ..., d]:
    # then all offsets of the window are plain slices. XLA computes what strided ones read anew.
    whole = [(before, -(n + before + after) % stride + after) for n, _, (before, after) in sizes]
    padded = jnp.pad(x, ((0, 0), *whole, (0, 0)))
    cut = [part for n in padded.shape[1:-1] for part in (n // stride, stride)]
    parts = padded.reshape(x.shape[0], *cut, x.shape[-1])
    rank = len(space)
    parts = jnp.moveaxis(parts, [2 * i + 2 for i in range(rank)], range(rank))
    total = None
    for offset in product(*map(range, window)):
        begin = [divmod(o, stride) for o in offset]
        steps = (slice(first, first + n) for (first, _), n in zip(begin, out, strict=True))
        part = parts[tuple(which for _, which in begin)]
        term = part[(slice(None), *steps)] * arrays.per_channel(kernel[offset], x)
        total = term if total is None else total + term
    assert total is not None
    return total


def _depthwise_grouped(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    letters = "DHW"[3 - (x.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        kernel[..., None, :],
        (stride,) * len(letters),
        padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=x.shape[-1],
    )


def dynamic(
    x: Float[Array, "b *space d"],
    kernel: Float[Array, "b *space n k"],
    *,
    window: Sequence[int],
    padding: Padding | None = None,
) -> Float[Array, "b *space d"]:
    """Depthwise convolution whose kernel is another one at every position (arXiv 1901.10430).

    ``y[i, c] = sum_j kernel[i, head of c, j] x[i + j - padding, c]``, zeros outside; j runs over
    the window row by row, and heads are n equal runs of channels. LOCAL.
    """
    if x.shape[-1] % kernel.shape[-2] or kernel.shape[-1] != math.prod(window):
        raise ValueError(
            f"dynamic: kernel {kernel.shape} does not fit x {x.shape} and window {tuple(window)}; "
            "it must end in [heads that divide the width, positions of the window]"
        )
    padding = same_padding(window) if padding is None else padding
    heads = x.reshape(*x.shape[:-1], kernel.shape[-2], -1)
    total = jnp.zeros_like(heads)
    for j, moved in enumerate(arrays.shifted(heads, window, padding)):
        total = total + kernel[..., j, None] * moved
    return total.reshape(x.shape)


# ---------------------------------------------------------------------------- modules


class DepthwiseConv(nn.Module):
    """Depthwise convolution with its kernel ``[window, ..., d]``; no bias unless asked for.

    Attributes:
      window: kernel size, the same in every space dimension.
      stride: the same in every space dimension.
      use_bias: adds a bias [d].
      dtype: of the computation; parameters are float32.
    """

    window: int = 3
    stride: int = 1
    use_bias: bool = False
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window // 2)

    @nn.compact
    def __call__(self, x: Float[Array, "b *space d"]) -> Float[Array, "b *out d"]:
        shape = (self.window,) * (x.ndim - 2) + (x.shape[-1],)
        # fan-in of one channel is the window, not window x channels
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(len(shape) - 1)),
            out_axis=(),
            batch_axis=-1,
        )
        kernel = self.param("kernel", init, shape)
        y = depthwise(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[-1:])
            y = y + arrays.per_channel(bias.astype(self.dtype), y)
        return y
