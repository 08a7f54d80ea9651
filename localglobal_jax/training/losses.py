# SPDX-License-Identifier: Apache-2.0
"""Losses per example; the caller averages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def smooth(targets: Float[Array, "*b v"], label_smoothing: float) -> Float[Array, "*b v"]:
    """Returns distributions of which a share is spread evenly over all v classes."""
    return (1 - label_smoothing) * targets + label_smoothing / targets.shape[-1]


def binary_cross_entropy(
    logits: Float[Array, "*b v"], targets: Float[Array, "*b v"]
) -> Float[Array, "*b"]:
    """Cross-entropy of a sigmoid per class, summed over the classes, in nats, in float32.

    ``targets``: a probability per class, which need not sum to 1.
    """
    wide = logits.astype(jnp.float32)
    return jnp.sum(jax.nn.softplus(wide) - targets.astype(jnp.float32) * wide, -1)


def cross_entropy(
    logits: Float[Array, "*b v"],
    targets: Integer[Array, "*b"] | Float[Array, "*b v"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, "*b"]:
    """Cross-entropy of a softmax over the last axis, in nats, in float32 whatever comes in.

    Args:
      logits: any leading axes; v classes.
      targets: class numbers in [0, v), or a distribution over the classes (MixUp, CutMix), whose
        classes may be weighted. A number out of range gives NaN: mask those positions.
      label_smoothing: fraction of every target that is spread evenly over all v classes
        (arXiv 1512.00567, section 7).
    """
    # Sums over the classes, without log-probabilities [*b, v] or a lookup in them: of that shape,
    # only the gradient is written to memory.
    wide = logits.astype(jnp.float32)
    wide = wide - jax.lax.stop_gradient(wide.max(-1, keepdims=True))
    total = jnp.log(jnp.exp(wide).sum(-1))
    if jnp.issubdtype(targets.dtype, jnp.integer):
        classes = jax.lax.broadcasted_iota(jnp.int32, wide.shape, wide.ndim - 1)
        here = classes == targets.astype(jnp.int32)[..., None]
        hit = jnp.sum(jnp.where(here, wide, 0), -1) - total
        hit = jnp.where((targets >= 0) & (targets < wide.shape[-1]), hit, jnp.nan)
    else:
        weights = targets.astype(jnp.float32)
        hit = jnp.sum(weights * wide, -1) - weights.sum(-1) * total
    mean = wide.mean(-1) - total
    if label_smoothing:  # 0 * mean would be NaN where a class is switched off with -inf
        return -((1 - label_smoothing) * hit + label_smoothing * mean)
    return -hit
