# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution: LOCAL, translation-equivariant, with a static or a dynamic kernel.

A dynamic kernel is predicted at each position. A convolution that mixes channels is
`flax.linen.Conv` with explicit padding; a 1x1 convolution is `flax.linen.Dense`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.cache import Cache, Index, check_causal, valid_at, zero_padding
from localglobal_jax.operators.dense import TORCH_UNIFORM, DenseGeneral, Projection, project
from localglobal_jax.operators.kernels import convolution as kernels
from localglobal_jax.operators.kernels.convolution import Padding
from localglobal_jax.operators.reach import Reach, local
from localglobal_jax.parallel import context

WIDE = 8  # positions of a window from which on band matrices are faster on CPU


def same_padding(window: Sequence[int]) -> Padding:
    """Returns k // 2 on both sides, PyTorch's padding. Flax's "SAME" is (0, 1) at stride 2."""
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

    >>> x, kernel = jnp.arange(5.0).reshape(1, 5, 1), jnp.ones((3, 1))
    >>> lg.operators.depthwise(x, kernel).ravel().tolist()
    [1.0, 3.0, 6.0, 9.0, 7.0]
    """
    if kernel.ndim != x.ndim - 1 or kernel.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"depthwise: kernel {kernel.shape} does not fit x {x.shape}; "
            f"it must be [*window, {x.shape[-1]}] with {x.ndim - 2} window dimension(s)"
        )
    both = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(both), kernel.astype(both)
    padding = same_padding(kernel.shape[:-1]) if padding is None else padding
    letters = "DHWXYZ"[: x.ndim - 2]

    def grouped(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel[..., None, :],
            (stride,) * len(letters),
            padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=x.shape[-1],
        )

    if not context.is_fused():
        return grouped(x, kernel)
    # XLA's grouped convolution on CPU is several times slower than shifted products, forward and
    # backward; on TPU and GPU the shifts' backward pass needs 6 to 9 times the temporary memory.
    shifted = partial(kernels.depthwise, stride=stride, padding=padding)
    forms = {"cuda": kernels.strided(grouped, stride, padding)} if stride > 1 else {}
    return context.per_platform(x, kernel, cpu=shifted, default=grouped, **forms)


def dynamic(
    x: Float[Array, "b *space d"],
    kernel: Float[Array, "b *space n k"],
    *,
    window: Sequence[int],
    padding: Padding | None = None,
) -> Float[Array, "b *space d"]:
    """Depthwise convolution with a kernel per position (arXiv 1901.10430).

    ``y[i, c] = sum_j kernel[i, head of c, j] x[i + j - padding, c]``, zeros outside; j runs over
    the window row by row, and heads are n equal runs of channels. LOCAL. `padding` before and after
    adds up to k - 1 in every dimension: there is one kernel per position of x.

    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> taps = jnp.array([2, 1, 1, 0])  # right neighbour, itself, itself, left neighbour
    >>> kernel = jnp.eye(3)[taps].reshape(1, 4, 1, 3)
    >>> lg.operators.dynamic(x, kernel, window=(3,)).ravel().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if x.shape[-1] % kernel.shape[-2] or kernel.shape[-1] != math.prod(window):
        raise ValueError(
            f"dynamic: kernel {kernel.shape} does not fit x {x.shape} and window {tuple(window)}; "
            "it must end in [heads that divide the width, positions of the window]"
        )
    padding = same_padding(window) if padding is None else padding
    if [sum(sides) for sides in padding] != [side - 1 for side in window]:
        raise ValueError(
            f"dynamic: padding {tuple(padding)} of window {tuple(window)}: before and after have "
            "to add up to one less than the window"
        )

    def shifted(x: Array, kernel: Array) -> Array:
        n = kernel.shape[-2]
        heads = x.reshape(*x.shape[:-1], n, x.shape[-1] // n)
        total = jnp.zeros_like(heads)
        for j, moved in enumerate(grids.shifted(heads, window, padding)):
            total = total + kernel[..., j, None] * moved
        return total.reshape(x.shape)

    if not context.is_fused() or len(window) > 1 or window[0] < WIDE:
        return shifted(x, kernel)
    # With 256 positions and a window of 15, a fifth of the time on CPU, forward and backward.
    banded = partial(kernels.dynamic, before=padding[0][0])
    return context.per_platform(x, kernel, cpu=banded, default=shifted)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with its kernel ``[window, ..., d]``; no bias unless asked for.

    Attributes:
      window: kernel size, the same in every space dimension.
      stride: the same in every space dimension.
      use_bias: adds a bias [d].
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.DepthwiseConv(window=3, stride=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["kernel"].shape
    ((2, 4, 4, 16), (3, 3, 16))
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
        grids.check_input(self, x, "b l d", "b h w d", parameter="kernel")
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
        kernel = self.param("kernel", init, shape, jnp.float32)
        y = depthwise(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
            y = y + grids.per_channel(bias.astype(self.dtype), y)
        return y


Kind = Literal["dynamic", "depthwise", "standard"]


def mix(
    parts: Sequence[Float[Array, "b *space d"]], gate: Float[Array, " parts"]
) -> Float[Array, "b *space d"]:
    """Sums the parts, weighed by the softmax of one learned number each (section 3.3)."""
    weights = jax.nn.softmax(gate)
    total = jnp.zeros_like(parts[0])
    for i, part in enumerate(parts):
        total = total + part * weights[i].astype(part.dtype)
    return total


class SharedValueConv(nn.Module):
    """Convolutions of attention's value projection, one per window, mixed by a gate (section 3.3).

    Attributes:
      heads: heads share a kernel when it is dynamic.
      windows: side of every kernel.
      kind: "dynamic": kernels are the softmax over the window of a linear function of the value at
        the position (arXiv 1901.10430); "depthwise": learned, static; "standard": mixes channels.
      gate: mixes several windows; without it they stand side by side and widen the output.
      causal: windows end at the position itself (sequences); else they are centred.
      dropout: of the weights of dynamic kernels.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.SharedValueConv(heads=2, windows=(3, 7))
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, str(module.reach)
    ((2, 8, 8, 16), 'LOCAL 3')
    """

    heads: int
    windows: tuple[int, ...] = (3, 7)
    kind: Kind = "dynamic"
    gate: bool = True
    causal: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        widest = max(self.windows)
        return local(widest - 1 if self.causal else widest // 2)

    @nn.compact
    def __call__(
        self, value: Float[Array, "b *space d"], *, last: bool = False, train: bool = False
    ) -> Float[Array, "b *out e"]:
        """Convolves and mixes. `last`: only at the last position of a causal sequence, [b, 1, e].

        Then `value` may be as short as the widest window, with zeros before the beginning.
        """
        grids.check_input(self, value, "b l d", "b h w d")
        if not self.causal and any(side % 2 == 0 for side in self.windows):
            raise ValueError(f"windows {self.windows}: centred windows have an odd size")
        if len(set(self.windows)) < len(self.windows):
            raise ValueError(f"windows {self.windows}: give each size once")
        parts = [self._convolve(value, side, last, train) for side in self.windows]
        if len(parts) == 1 or not self.gate:
            return jnp.concatenate(parts, -1)
        equal = nn.initializers.constant(1 / len(parts))
        return mix(parts, self.param("gate", equal, (len(parts),), jnp.float32))

    def _convolve(self, value: Array, side: int, last: bool, train: bool) -> Array:
        rank, width = value.ndim - 2, value.shape[-1]
        window, name = (side,) * rank, f"kernel{side}"
        padding = ((side - 1, 0),) if self.causal else same_padding(window)
        here = value
        if last:
            here, value, padding = value[:, -1:], value[:, -side:], ((0, 0),)
        if self.kind == "standard":
            convolution = nn.Conv(
                width, window, padding=padding, use_bias=False, dtype=self.dtype, name=name
            )
            return convolution(value)
        if self.kind == "depthwise":
            normal = nn.initializers.normal(side ** (-0.5 * rank))
            kernel = self.param(name, normal, (*window, width), jnp.float32).astype(self.dtype)
            return depthwise(value.astype(self.dtype), kernel, padding=padding)
        logits = DenseGeneral(
            (self.heads, side**rank),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=TORCH_UNIFORM,
            name=name,
        )(here)
        # Over the whole window: positions outside keep their share, as in the published code.
        kernel = jax.nn.softmax(logits.astype(jnp.promote_types(self.dtype, jnp.float32)), -1)
        kernel = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{side}")(kernel)
        kernel = kernel.astype(value.dtype)
        if not last:
            return dynamic(value, kernel, window=window, padding=padding)
        heads = value.reshape(*value.shape[:-1], self.heads, value.shape[-1] // self.heads)
        # A sum instead of a matrix product, for which XLA on CPU transposes the window.
        return (kernel.swapaxes(1, 3) * heads).sum(1).reshape(here.shape)


class DynamicConv(nn.Module):
    """Gated linear unit, then a convolution whose kernel is predicted (arXiv 1901.10430).

    Attributes:
      features: width of input and output. `heads`: channels of a head share a kernel.
      window: of the kernel. `causal`: it ends at the position itself.
      kind: of the convolution, see `SharedValueConv`.
      zero_padding: padding enters the convolution as zeros, see `MuseSequence`.
      dropout: of the kernel's weights.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.operators.DynamicConv(16, heads=2, window=3, causal=True)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, str(module.reach)
    ((2, 6, 16), 'LOCAL 2')
    """

    features: int
    heads: int
    window: int = 7
    causal: bool = False
    kind: Kind = "dynamic"
    zero_padding: bool = True
    dropout: float = 0.1
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window - 1 if self.causal else self.window // 2)

    def setup(self) -> None:
        xavier, d = nn.initializers.xavier_uniform(), self.features
        self.input = Projection(d, (2, d), kernel_init=xavier, name="input")
        self.output = Projection(d, (d,), kernel_init=xavier, name="output")
        self.convolution = SharedValueConv(
            self.heads,
            (self.window,),
            self.kind,
            causal=self.causal,
            dropout=self.dropout,
            dtype=self.dtype,
            name="convolution",
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        grids.check_input(self, x, "b l d")
        y = zero_padding(self._gate(x), mask if self.zero_padding else None)
        y = self.convolution(y, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache of the window's past positions; `length` is not used."""
        check_causal(self)
        return {"window": jnp.zeros((batch, self.window - 1, self.features), self.dtype)}

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """Returns the output at the next position."""
        check_causal(self)
        here = valid_at(valid, index) if self.zero_padding and valid is not None else None
        window = jnp.concatenate([cache["window"], zero_padding(self._gate(x), here)], 1)
        y = self.convolution(window, last=True)
        return project(y, [self.output()], dtype=self.dtype)[0], {"window": window[:, 1:]}

    def _gate(self, x: Array) -> Array:
        value, gate = jnp.split(project(x, [self.input()], dtype=self.dtype)[0], 2, -1)
        return value * nn.sigmoid(gate)
