# SPDX-License-Identifier: Apache-2.0
"""Parts of blocks other than the operator: norms, pooling, shortcuts, scales, pointwise nets."""

from functools import partial
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.activations import ACTIVATIONS, Activation
from localglobal_jax.operators.dense import Dense
from localglobal_jax.operators.kernels.batch_norm import (
    FROZEN_NORMS,
    BatchNorm,
    activate,
    moments,
)
from localglobal_jax.parallel import context

Grid = Float[Array, "b h w d"]
Pool = Literal["avg2", "max2", "avg", "max"]
Rounding = Literal["up", "down"] | None

Norm = Literal["batch", "layer"]


def make_norm(kind: Norm, *, eps: float, train: bool, dtype: str, name: str) -> nn.Module:
    """Returns a "batch" or "layer" norm; statistics are float32 at least.

    Batch statistics are over the global batch on any number of devices, or over a device's part
    with `parallel.batch_norm=per_device`. Running statistics follow TensorFlow's rule: momentum 0.9
    and the biased variance (torch keeps the unbiased one; they differ by n / (n - 1)).

    >>> norm = lg.blocks.make_norm("layer", eps=1e-6, train=False, dtype="float32", name="norm")
    >>> variables = norm.init(jax.random.key(0), jnp.ones((2, 16)))
    >>> sorted(variables["params"])
    ['bias', 'scale']
    """
    if kind not in get_args(Norm):
        raise ValueError(f"norm {kind!r}: allowed are {get_args(Norm)}")
    if kind == "batch":
        return _BatchNorm(
            train=train,
            axis_name=context.norm_axis(),
            momentum=0.9,
            epsilon=eps,
            dtype=dtype,
            name=name,
        )
    return nn.LayerNorm(epsilon=eps, dtype=dtype, name=name)


class _BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with running statistics in evaluation and under `FROZEN_NORMS`."""

    train: bool = False

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        frozen = self.has_variable(FROZEN_NORMS, "mark")
        return super().__call__(x, use_running_average=not self.train or frozen)


def norm_activation(
    x: Float[Array, "b *space d"],
    *,
    kind: Norm,
    activation: Activation,
    eps: float,
    train: bool,
    dtype: str,
    name: str,
) -> Float[Array, "b *space d"]:
    """Computes ``act(Norm(x))``, see `make_norm`; makes the caller's submodule `name`.

    >>> class Mine(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, *, train=False):
    ...         return lg.blocks.norm_activation(
    ...             x, kind="batch", activation="gelu", eps=1e-5, train=train, dtype="float32",
    ...             name="norm",
    ...         )
    >>> variables = jax.eval_shape(Mine().init, jax.random.key(0), jnp.ones((2, 8, 8, 16)))
    >>> sorted(variables), list(variables["params"])
    (['batch_stats', 'params'], ['norm'])
    """
    if kind == "batch" and context.is_fused():
        affine = BatchNorm(x.shape[-1], eps, name=name)(moments(x) if train else None)
        return activate(x.astype(dtype), affine, activation)
    norm = make_norm(kind, eps=eps, train=train, dtype=dtype, name=name)
    return ACTIVATIONS[activation](norm(x))


def make_divisible(value: float, divisor: int = 8, limit: float = 0.9) -> int:
    """Rounds to a multiple of `divisor`, never below `limit` of the value (MobileNet's rule).

    >>> [lg.blocks.make_divisible(value) for value in (1, 11, 12, 100)]
    [8, 16, 16, 104]
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * value else rounded


def pool(x: Grid, kind: Pool) -> Grid:
    """Halves a grid: windows of 2 ("avg2", "max2"), or of 3 with padding 1 ("avg", "max").

    Averages count only the positions inside the grid.

    >>> jax.eval_shape(lambda x: lg.blocks.pool(x, "max2"), jnp.ones((2, 8, 8, 16))).shape
    (2, 4, 4, 16)
    """
    if kind not in get_args(Pool):
        raise ValueError(f"pool {kind!r}: allowed are {get_args(Pool)}")
    window, padding = (2, "VALID") if kind.endswith("2") else (3, ((1, 1), (1, 1)))
    if kind.startswith("max"):
        return nn.max_pool(x, (window, window), (2, 2), padding)
    # Counting inside positions gives float32 for any input; windows of 2 are always inside.
    y = nn.avg_pool(x, (window, window), (2, 2), padding, count_include_pad=window == 2)
    return y.astype(x.dtype)


def pool_rounding(kind: Pool) -> Rounding:
    """Returns how `pool` rounds when it halves an odd grid."""
    return "down" if kind.endswith("2") else "up"


def check_grid(x: Grid, stride: int, odd: Rounding) -> None:
    """Raises ValueError for an odd grid that a block cannot halve, by its `odd_grids`."""
    if stride == 2 and odd is None and any(side % 2 for side in x.shape[1:3]):
        raise ValueError(
            f"stride=2 on a grid of {x.shape[1]} x {x.shape[2]}: one path or both would lose a row "
            'or a column. Pad it to an even one, or let all paths pool by "avg" or "max"'
        )


class Shortcut(nn.Module):
    """The residual path of a block: pooled where the block strides, projected where it widens.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.Shortcut(features=32, stride=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 32)
    """

    features: int
    stride: int
    pool: Pool = "avg2"
    use_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        if self.stride not in (1, 2):
            raise ValueError(f"stride={self.stride}: a block has stride 1 or 2")
        if self.stride == 2:
            if min(x.shape[1:3]) < 2:
                raise ValueError(
                    f"stride=2 on a grid of {x.shape[1]} x {x.shape[2]}: it needs 2 x 2"
                )
            x = pool(x, self.pool)
        if x.shape[-1] != self.features:
            x = Dense(self.features, self.use_bias, dtype=self.dtype, name="project")(x)
        return x


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of an example (arXiv 1603.09382), scales up the others.

    >>> x = jnp.ones((8, 4))
    >>> module = lg.blocks.DropPath(rate=0.5)
    >>> y = module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    >>> sorted(set(y.ravel().tolist()))  # an example is dropped or scaled up
    [0.0, 2.0]
    """

    rate: float | Float[Array, ""] = 0.0  # an array where blocks are scanned

    @nn.compact
    def __call__(self, x: Float[Array, " b *rest"], *, train: bool) -> Float[Array, " b *rest"]:
        if not train or (isinstance(self.rate, int | float) and self.rate == 0):
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        scale = jnp.where(keep == 0, 1, keep)  # at rate 1 nothing is kept
        return x * kept.astype(x.dtype) / scale.astype(x.dtype)


class LayerScale(nn.Module):
    """A learned factor per channel on a branch (arXiv 2103.17239, CaiT).

    >>> module = lg.blocks.LayerScale(initial=0.5)
    >>> module.init_with_output(jax.random.key(0), jnp.ones(3))[0].tolist()
    [0.5, 0.5, 0.5]
    """

    initial: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale", nn.initializers.constant(self.initial), x.shape[-1:], jnp.float32
        )
        return x * grids.per_channel(scale.astype(x.dtype), x)


class MLP(nn.Module):
    """Two dense layers at every position.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.MLP(hidden=64)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables["params"]["hidden"]["kernel"].shape
    ((2, 6, 16), (16, 64))
    """

    hidden: int
    activation: Activation = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b *space d"]) -> Float[Array, "b *space d"]:
        dense = partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        y = ACTIVATIONS[self.activation](dense(self.hidden, name="hidden")(x))
        return dense(x.shape[-1], name="output")(y)


class SqueezeExcite(nn.Module):
    """Channels gated by a global average of the grid (arXiv 1709.01507).

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.blocks.SqueezeExcite(hidden=4)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> sorted(variables["params"])
    ['expand', 'reduce']
    """

    hidden: int
    activation: Activation = "silu"
    dtype: str = "float32"

    def __call__(self, x: Grid) -> Grid:
        return x * self.gate(x)

    @nn.compact
    def gate(self, x: Grid) -> Float[Array, "b 1 1 d"]:
        """Returns the factor of every channel."""
        s = x.mean((1, 2), keepdims=True)
        s = Dense(self.hidden, dtype=self.dtype, name="reduce")(s)
        s = Dense(x.shape[-1], dtype=self.dtype, name="expand")(ACTIVATIONS[self.activation](s))
        return nn.sigmoid(s)
