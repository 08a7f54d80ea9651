# SPDX-License-Identifier: Apache-2.0
"""BatchNorm fused with the matrix before it and the activation after it (arXiv 1502.03167).

Convolution stages cost memory traffic, and autodiff of the plain chain keeps several copies of
every expanded activation. Three identities avoid them. With them, and `attention.attend`, a
training step of CoAtNet-0 has 0.74 of the cycles, 0.67 of the bytes and 0.60 of the temporary
memory (TPU v5e, experiments/benchmarks/tpu.csv); on CPU an MBConv block in evaluation takes half.

- ``act(norm(x))`` is computed again in the backward pass: only x is kept.
- The statistics of ``x @ kernel`` follow from the mean and the covariance of x. So the norm after
  a matrix, and one before it, are folded into the matrix: nothing between them is ever stored.
- A gate per example and channel before a matrix has its gradient, and the matrix its own, from one
  small product per example.

Legend: d width in, e width out. Statistics are float32 at least.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax.operators import grids
from localglobal_jax.operators.activations import ACTIVATIONS, Activation
from localglobal_jax.operators.dense import product
from localglobal_jax.parallel import context

# Collection of variables that marks the norms of frozen parts: these keep their running statistics,
# and normalise by them in training, too. A collection reaches blocks in any form of `blocks.stack`.
FROZEN_NORMS = "frozen_norms"
Moments = tuple[Float[Array, " d"], Float[Array, " d"]]  # mean, biased variance


class Affine(NamedTuple):
    """A norm of known statistics: ``(x - center) * scale + offset`` per channel."""

    center: Float[Array, " d"]
    scale: Float[Array, " d"]
    offset: Float[Array, " d"]


# ---------------------------------------------------------------------------- statistics


def moments(x: Float[Array, "*b d"]) -> Moments:
    """Returns mean and variance per channel, in one pass; over all devices under `norm_axis`."""
    x, axes = x.astype(_wide(x)), tuple(range(x.ndim - 1))
    mean, square = _over_devices((x.mean(axes), jnp.square(x).mean(axes)))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def covariance(x: Float[Array, "*b d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Returns mean and biased covariance of the channels, in two passes.

    So a mean that is large relative to the deviation does not cost digits.
    """
    rows = x.reshape(-1, x.shape[-1])
    (mean,) = _over_devices((rows.astype(_wide(x)).mean(0),))
    centered = (rows - grids.per_channel(mean, rows)).astype(x.dtype)
    (spread,) = _over_devices((_gram(centered) / len(rows),))
    return mean, spread


def product_moments(
    covariance: Float[Array, "d d"], before: Affine, kernel: Float[Array, "d e"]
) -> tuple[Float[Array, " e"], Float[Array, " e"]]:
    """Returns the `moments` of ``before(x) @ kernel``, from the covariance and mean of x."""
    scaled = before.scale[:, None] * kernel
    variance = jnp.sum(scaled * jnp.matmul(covariance, scaled, precision="highest"), 0)
    return jnp.matmul(before.offset, kernel, precision="highest"), jnp.maximum(variance, 0)


@jax.custom_vjp
def _gram(rows: Float[Array, "n d"]) -> Float[Array, "d d"]:
    return jnp.matmul(rows.T, rows, precision="highest", preferred_element_type=_wide(rows))


def _gram_backward(rows: Array, g: Array) -> tuple[Array]:
    return (rows @ (g + g.T).astype(rows.dtype),)  # autodiff makes two products


_gram.defvjp(lambda rows: (_gram(rows), rows), _gram_backward)


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _over_devices(means: tuple[Array, ...]) -> tuple[Array, ...]:
    axis = context.norm_axis()
    return lax.pmean(means, axis) if axis else means


# ---------------------------------------------------------------------------- functions


def recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `function` with a backward pass that computes it again from its arguments.

    The barrier of `jax.checkpoint` also covers the factor of the derivative and so writes it to
    memory; this one covers the arguments alone. No forward-mode derivative.
    """

    @jax.custom_vjp
    def apply(*args: Any) -> Array:
        return function(*args)

    def backward(args: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
        return jax.vjp(function, *lax.optimization_barrier(args))[1](g)

    apply.defvjp(lambda *args: (function(*args), args), backward)
    return apply


def activate(x: Float[Array, "*b d"], norm: Affine, activation: Activation) -> Array:
    """Computes ``act(norm(x))``, and again from x in the backward pass."""

    def apply(x: Array, norm: Affine) -> Array:
        # Rounded before the activation, so that its gradient is not a float32 copy.
        return ACTIVATIONS[activation](_normed(x, norm))

    @jax.custom_vjp
    def narrow(x: Array, norm: Affine) -> Array:
        return apply(x, norm)

    def backward(saved: tuple[Array, Affine], g: Array) -> tuple[Array, Affine]:
        x, norm = lax.optimization_barrier(saved)
        (g,) = jax.vjp(ACTIVATIONS[activation], _normed(x, norm))[1](g)
        # XLA drops a rounding between two operations in float32, and would store this array in
        # float32 and read it three times. It keeps a barrier.
        g = lax.optimization_barrier(g)
        wide, axes = g.astype(norm.scale.dtype), tuple(range(g.ndim - 1))
        offset = wide.sum(axes)
        scale = (wide * (x - grids.per_channel(norm.center, x))).sum(axes)
        dx = (g * grids.per_channel(norm.scale, g)).astype(x.dtype)
        return dx, Affine(-norm.scale * offset, scale, offset)

    narrow.defvjp(lambda x, norm: (apply(x, norm), (x, norm)), backward)
    return context.per_platform(x, norm, cuda=narrow, default=recomputed(apply))


def _normed(x: Float[Array, "*b d"], norm: Affine) -> Float[Array, "*b d"]:
    center, scale, offset = (grids.per_channel(v, x) for v in norm)
    return ((x - center) * scale + offset).astype(x.dtype)


def activate_product(
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d e"],
    before: Affine,
    after: Affine,
    activation: Activation,
    *,
    train: bool,
) -> Float[Array, "*b e"]:
    """Computes ``act(after(before(x) @ kernel))`` as one product, again in the backward pass."""

    wide = after.scale.dtype

    def multiply(
        x: Array, kernel: Array, before: Affine, after: Affine, *, dtype: Any
    ) -> tuple[Array, Array]:
        folded = (before.scale[:, None] * kernel * after.scale[None, :]).astype(x.dtype)
        mean = jnp.matmul(before.offset, kernel, precision="highest")
        bias = (mean - after.center) * after.scale + after.offset
        if train:  # centered before it is rounded: a large mean would swallow small gradients
            x = (x - grids.per_channel(before.center, x)).astype(x.dtype)
        else:  # one pass less
            center = jnp.matmul(before.center, folded.astype(bias.dtype), precision="highest")
            bias = bias - center
        return product(x, folded, preferred_element_type=dtype), bias

    def act(y: Array, bias: Array) -> Array:
        return ACTIVATIONS[activation]((y + grids.per_channel(bias, y)).astype(x.dtype))

    def repeated(*args: Any) -> Array:
        return act(*multiply(*args, dtype=wide))

    def kept(*args: Any, dtype: Any = wide) -> Array:
        return recomputed(act)(*multiply(*args, dtype=dtype))

    return context.per_platform(
        x,
        kernel,
        before,
        after,
        cpu=kept,
        # A product is a call of a library, which no sum or activation is fused with: its result is
        # kept, and narrow, or the backward pass would read it in float32.
        cuda=functools.partial(kept, dtype=x.dtype),
        default=recomputed(repeated),
    )


def gated_product(
    gate: Float[Array, "b d"],
    x: Float[Array, "b *space d"],
    kernel: Float[Array, "d e"],
    *_: Any,
    **__: Any,
) -> Float[Array, "b *space e"]:
    """Computes ``(x * gate) @ kernel``, a gate per example; ignores `lax.dot_general`'s options."""
    return _gated_product(gate, x, kernel)


@jax.custom_vjp
def _gated_product(gate: Array, x: Array, kernel: Array) -> Array:
    return product(x * _spread(gate, x), kernel)


def _gated_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    gate, x, kernel = saved
    wide = _wide(x)
    each = jnp.einsum("b...d,b...e->bde", x, g, preferred_element_type=wide)
    dgate = jnp.einsum("bde,de->bd", each, kernel.astype(wide))
    dkernel = jnp.einsum("bde,bd->de", each, gate.astype(wide))
    dx = product(g, kernel.T) * _spread(gate, x)
    return dgate.astype(gate.dtype), dx, dkernel.astype(kernel.dtype)


_gated_product.defvjp(lambda *args: (_gated_product(*args), args), _gated_backward)


def _spread(gate: Array, x: Array) -> Array:
    return lax.expand_dims(gate, range(1, x.ndim - 1))


# ---------------------------------------------------------------------------- modules


class BatchNorm(nn.Module):
    """The parameters and running statistics of `flax.linen.BatchNorm`, without its arithmetic."""

    features: int
    eps: float
    momentum: float = 0.9

    def is_frozen(self) -> bool:
        """Returns whether the norm keeps its running statistics, see `FROZEN_NORMS`."""
        return self.has_variable(FROZEN_NORMS, "mark")

    @nn.compact
    def __call__(self, batch: Moments | None) -> Affine:
        """Returns the norm by the batch's moments and updates the running ones; None: by those."""
        shape = (self.features,)
        running = (
            self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        )
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        batch = None if self.is_frozen() else batch
        mean, variance = batch or (running[0].value, running[1].value)
        if batch and not self.is_initializing():
            for old, new in zip(running, batch, strict=True):
                old.value = self.momentum * old.value + (1 - self.momentum) * new
        return Affine(mean, scale * lax.rsqrt(variance + self.eps), bias)


class Kernel(nn.Module):
    """The kernel of a `flax.linen.Dense` without a bias."""

    features: int

    @nn.compact
    def __call__(self, width: int) -> Float[Array, "d e"]:
        return self.param(
            "kernel", nn.linear.default_kernel_init, (width, self.features), jnp.float32
        )
