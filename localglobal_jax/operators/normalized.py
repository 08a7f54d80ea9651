# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with what stands around it (arXiv 1502.03167): a matrix before, an activation after.

Memory traffic is what convolution stages cost, and autodiff of the plain chain keeps several copies
of every expanded activation for the backward pass. Two identities do without them:

- ``act(x * scale + shift)`` is computed again where its derivative is needed: only x is kept.
- The statistics of ``x @ kernel`` follow from the mean and the covariance of x. So the norm after
  a matrix, and one before it, are folded into the matrix: nothing between them is ever stored.

Legend: d width in, e width out. Statistics are float32 at least.
"""

from typing import NamedTuple

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


def covariance(x: Float[Array, "*b d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and biased covariance of the channels."""
    rows = x.reshape(-1, x.shape[-1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    square = jnp.matmul(rows.T, rows, precision="highest", preferred_element_type=wide)
    mean, square = _mean((rows.astype(wide).mean(0), square / rows.shape[0]))
    return mean, square - jnp.outer(mean, mean)


def activate(x: Float[Array, "*b d"], affine: Affine, activation: Activation) -> Array:
    """``act((x - center) * scale + offset)``; the backward pass computes it again from x."""

    @jax.checkpoint
    def apply(x: Array, affine: Affine) -> Array:
        center, scale, offset = (arrays.per_channel(v, x) for v in affine)
        return ACTIVATIONS[activation](((x - center) * scale + offset).astype(x.dtype))

    return apply(x, affine)


def activate_product(
    x: Float[Array, "*b d"],
    kernel: Float[Array, "d e"],
    before: Affine,
    after: Affine,
    activation: Activation,
) -> Float[Array, "*b e"]:
    """``act(after(before(x) @ kernel))`` as one product; the backward pass repeats it from x."""

    @jax.checkpoint
    def apply(x: Array, kernel: Array, before: Affine, after: Affine) -> Array:
        folded = (before.scale[:, None] * kernel * after.scale).astype(x.dtype)
        # The center meets the rounded kernel, as x does: no mean is left over.
        bias = (before.offset @ kernel - after.center) * after.scale + after.offset
        bias -= before.center @ folded.astype(bias.dtype)
        return ACTIVATIONS[activation](x @ folded + bias.astype(x.dtype))

    return apply(x, kernel, before, after)


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
