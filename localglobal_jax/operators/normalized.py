# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with what stands around it (arXiv 1502.03167): a matrix before, an activation after.

Memory traffic is what convolution stages cost, and autodiff of the plain chain keeps several copies
of every expanded activation for the backward pass. Two identities do without them:

- ``act(x * scale + shift)`` is computed again where its derivative is needed: only x is kept.
- The statistics of ``x @ kernel`` follow from the mean and the covariance of x. So the norm after
  a matrix, and one before it, are folded into the matrix: nothing between them is ever stored.

Legend: d width in, e width out. Statistics are float32 at least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax import arrays, step_context
from localglobal_jax.operators.activation import ACTIVATIONS, Activation


class Affine(NamedTuple):
    """``(x - center) * scale + offset`` per channel."""

    center: Float[Array, " d"]
    scale: Float[Array, " d"]
    offset: Float[Array, " d"]


def _mean(x: Array) -> Array:
    """Over all devices where a step asks for it, else of what is here."""
    axis = step_context.norm_axis()
    return lax.pmean(x, axis) if axis else x


def moments(x: Float[Array, "*b d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Mean and biased variance per channel, in one pass."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    mean, square = _mean(jnp.stack([x.mean(axes), jnp.square(x).mean(axes)]))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


@jax.custom_vjp
def _second_moment(rows: Float[Array, "n d"]) -> Float[Array, "d d"]:
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest", preferred_element_type=wide)


def _second_moment_backward(rows: Array, g: Array) -> tuple[Array]:
    # Symmetric: one product, where autodiff makes two.
    return (rows @ (g + g.T).astype(rows.dtype),)


_second_moment.defvjp(lambda rows: (_second_moment(rows), rows), _second_moment_backward)


def covariance(x: Float[Array, "*b d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and biased covariance of the channels."""
    rows = x.reshape(-1, x.shape[-1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean, square = _mean((rows.astype(wide).mean(0), _second_moment(rows) / rows.shape[0]))
    return mean, square - jnp.outer(mean, mean)


def recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, of which the backward pass keeps the arguments alone and computes it again.

    Unlike `jax.checkpoint` it holds back only the arguments, not what is to be multiplied with the
    derivative: so that fuses into whatever made it.
    """

    @jax.custom_vjp
    def apply(*args: Any) -> Array:
        return function(*args)

    def backward(args: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
        return jax.vjp(function, *lax.optimization_barrier(args))[1](g)

    apply.defvjp(lambda *args: (function(*args), args), backward)
    return apply


def activate(x: Float[Array, "*b d"], affine: Affine, activation: Activation) -> Array:
    """``act((x - center) * scale + offset)``; the backward pass computes it again from x."""

    def apply(x: Array, affine: Affine) -> Array:
        center, scale, offset = (arrays.per_channel(v, x) for v in affine)
        return ACTIVATIONS[activation](((x - center) * scale + offset).astype(x.dtype))

    return recomputed(apply)(x, affine)


def activate_product(
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d e"],
    before: Affine,
    after: Affine,
    activation: Activation,
) -> Float[Array, "*b e"]:
    """``act(after(before(x) @ kernel))`` as one product; the backward pass repeats it from x."""

    def apply(x: Array, kernel: Array, before: Affine, after: Affine) -> Array:
        folded = (before.scale[:, None] * kernel * after.scale).astype(x.dtype)
        # The center meets the rounded kernel, as x does: no mean is left over.
        bias = (before.offset @ kernel - after.center) * after.scale + after.offset
        bias -= before.center @ folded.astype(bias.dtype)
        return ACTIVATIONS[activation](x @ folded + bias.astype(x.dtype))

    return recomputed(apply)(x, kernel, before, after)


@jax.custom_vjp
def gated_product(
    x: Float[Array, "b *space d"], gate: Float[Array, "b d"], kernel: Float[Array, "d e"]
) -> Float[Array, "b *space e"]:
    """``(x * gate) @ kernel``, with a gate per example.

    The gradients of gate and kernel both follow from one product per example, ``x^T g``.
    """
    return (x * _spread(gate, x)) @ kernel


def _spread(gate: Array, x: Array) -> Array:
    return gate.reshape(gate.shape[0], *(1,) * (x.ndim - 2), -1)


def _gated_forward(x: Array, gate: Array, kernel: Array) -> tuple[Array, Any]:
    return gated_product(x, gate, kernel), (x, gate, kernel)


def _gated_backward(saved: Any, g: Array) -> tuple[Array, Array, Array]:
    x, gate, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    each = jnp.einsum("b...d,b...e->bde", x, g, preferred_element_type=wide)
    dx = (g @ kernel.T) * _spread(gate, x)
    dgate = jnp.einsum("bde,de->bd", each, kernel.astype(wide)).astype(gate.dtype)
    return dx, dgate, jnp.einsum("bde,bd->de", each, gate.astype(wide)).astype(kernel.dtype)


gated_product.defvjp(_gated_forward, _gated_backward)


class BatchNorm(nn.Module):
    """The parameters and running statistics of `flax.linen.BatchNorm`, without its arithmetic."""

    eps: float
    momentum: float = 0.9

    @nn.compact
    def __call__(
        self, mean: Float[Array, " d"], variance: Float[Array, " d"], *, train: bool
    ) -> Affine:
        """What normalises: by the given statistics of the batch, which the running ones follow, or
        in evaluation by the running ones.
        """
        shape = mean.shape
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            mean, variance = running_mean.value, running_variance.value
        elif not self.is_initializing():
            for running, new in ((running_mean, mean), (running_variance, variance)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return Affine(mean, scale * lax.rsqrt(variance + self.eps), bias)
