# SPDX-License-Identifier: Apache-2.0
"""Mix-token: CutMix on embedded tokens instead of pixels (token labelling, arXiv 2104.10858).

In a training batch of n, over all devices, example i takes a box of tokens from example n - 1 - i,
the same box for all (the authors draw one per device and stay within its examples). The
logits of single tokens are put back, so that each is compared with its own label. The logits of the
whole image are compared with a mixture of two labels, in the ratio of `kept_share`.

A box is ``[top, left, bottom, right]``, int32, the last two exclusive, in tokens of the last grid;
all zero: nothing is mixed. The numbers are drawn as VOLO's authors draw them (timm rounds the far
sides up), so the box of an odd side is one token smaller.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

Box = Int[Array, "4"]

NO_BOX = (0, 0, 0, 0)


def sample_box(key: Key[Array, ""], grid: tuple[int, int]) -> Box:
    """Samples a box: uniform centre, and a uniform share of the grid before it is clipped."""
    share_key, centre_key = jax.random.split(key)
    size = jnp.array(grid)
    side = jnp.sqrt(jax.random.uniform(share_key))  # lambda ~ Beta(1, 1), side = sqrt(1 - lambda)
    half = (size * side).astype(jnp.int32) // 2
    centre = jax.random.randint(centre_key, (2,), 0, size)
    return jnp.concatenate([jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)])


def swap(x: Shaped[Array, "b h w d"], box: Box, *, scale: int = 1) -> Shaped[Array, "b h w d"]:
    """Exchanges the box between examples i and n - 1 - i; its own inverse.

    `scale` is the number of positions of `x` per token of the box, in each direction.
    """
    top, left, bottom, right = box * scale
    row = jnp.arange(x.shape[1])[None, :, None, None]
    column = jnp.arange(x.shape[2])[None, None, :, None]
    # A mask, not a slice: the box is random and shapes are not.
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return jnp.where(inside, x[::-1], x)


def kept_share(box: Box, grid: tuple[int, int]) -> Float[Array, ""]:
    """Returns the share of an image's tokens that are its own: the weight of its label."""
    top, left, bottom, right = box
    return 1 - (bottom - top) * (right - left) / (grid[0] * grid[1])
