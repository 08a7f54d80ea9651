# SPDX-License-Identifier: Apache-2.0
"""Normalization, MixUp, CutMix and token targets of a batch on the device. Pure functions.

MixUp and CutMix add a part of another image and the same part of its label; they differ in the
shape of the part: MixUp takes a share of every pixel, CutMix every pixel of a rectangle.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from localglobal_jax.config import schema
from localglobal_jax.operators import grids


def normalize(image: UInt8[Array, "b h w c"], options: schema.Images) -> Float[Array, "b h w c"]:
    """Returns float32 ``(x / 255 - mean) / std`` per channel."""
    pixels = image.astype(jnp.float32) / 255
    mean, std = (
        grids.per_channel(jnp.array(v, jnp.float32), pixels) for v in (options.mean, options.std)
    )
    return (pixels - mean) / std


def token_targets(
    maps: Float[Array, "b 2 k h w"],
    boxes: Float[Array, "b 5"],
    grid: tuple[int, int],
    classes: int,
) -> Float[Array, "b i j classes"]:
    """Returns the distribution over the classes for each token, by label maps of a teacher.

    A map is cropped as its image was, by the mean of two times two bilinear samples for each token
    (RoIAlign, arXiv 1703.06870, as in the code of token labelling). The softmax is over the k
    largest logits.

    Args:
      maps: logits, then classes, over the whole image.
      boxes: top, left, height and width of the crop, as shares of the image; 1 if it was flipped.
      grid: rows and columns of tokens.
    """
    maps, boxes = maps.astype(jnp.float32), boxes.astype(jnp.float32)
    weights = jax.nn.softmax(maps[:, 0], axis=1)  # [b, k, h, w]
    dense = jnp.sum(jax.nn.one_hot(maps[:, 1], classes) * weights[..., None], 1)  # [b, h, w, c]
    rows = _samples(boxes[:, 0], boxes[:, 2], grid[0], dense.shape[1])
    columns = _samples(boxes[:, 1], boxes[:, 3], grid[1], dense.shape[2])
    flipped = boxes[:, 4][:, None, None] > 0
    columns = jnp.where(flipped, columns[:, ::-1], columns)
    return jnp.einsum("bih,bjw,bhwc->bijc", rows, columns, dense)


def _samples(
    start: Float[Array, " b"], size: Float[Array, " b"], tokens: int, places: int
) -> Float[Array, "b tokens places"]:
    """Returns the weight of every place in the mean of two bilinear samples for each token."""
    share = (jnp.arange(2 * tokens) + 0.5) / (2 * tokens)
    at = (start[:, None] + size[:, None] * share[None]) * places - 0.5
    at = jnp.clip(at, 0, places - 1)[..., None]  # [b, 2 tokens, 1]
    weights = jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(places)[None, None]))
    return weights.reshape(len(start), tokens, 2, places).mean(2)


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    partners: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its partner, the batch read backwards.

    MixUp: arXiv 1710.09412, section 1; CutMix: arXiv 1905.04899, eq. 1 and 2. ``mixup`` and
    ``cutmix`` are the alphas of Beta(alpha, alpha), 0 for off; with both on, the batch takes one of
    the two at random. One share and one rectangle per batch, as in the papers' code; the share of a
    label is the share of pixels that really came with it, once the rectangle is cut at the border.

    ``images: [b, h, w, c]`` floating, ``labels: [b, classes]``, ``mask: [b]``. An example whose
    partner is masked stays as it is: the partner's pixels may be padding and its label is void.
    ``partners`` are the images and labels read backwards, if the caller can do that with fewer
    bytes between devices (uint8 images, class numbers).
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"mix takes normalised floating images, not {images.dtype}")
    if not (mixup or cutmix):
        return images, labels
    which, share_key, box_key = jax.random.split(key, 3)
    _, h, w, _ = images.shape
    use_cutmix = cutmix > 0 and (mixup == 0 or jax.random.bernoulli(which))
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)  # of the partner
    part = jnp.where(use_cutmix, _box(box_key, share, h, w), share)  # [h, w], of the partner
    part = part[None, :, :, None].astype(images.dtype)
    weight = part.mean(dtype=labels.dtype)
    live = mask * mask[::-1] > 0  # [b]; the others are their own partner
    other_images, other_labels = partners or (images[::-1], labels[::-1])
    other_images = jnp.where(live[:, None, None, None], other_images, images)
    other_labels = jnp.where(live[:, None], other_labels, labels)
    return (
        images + part * (other_images - images),
        labels + weight * (other_labels - labels),
    )


def _box(key: jax.Array, area: jax.Array, h: int, w: int) -> jax.Array:
    """Returns ``[h, w]``: 1 inside, 0 outside a rectangle at a random centre."""
    centre = jax.random.uniform(key, (2,)) * jnp.array([h, w])
    half = jnp.sqrt(area) * jnp.array([h, w]) / 2
    low, high = jnp.round(centre - half), jnp.round(centre + half)
    rows, columns = jnp.arange(h), jnp.arange(w)
    inside_rows = (rows >= low[0]) & (rows < high[0])
    inside_columns = (columns >= low[1]) & (columns < high[1])
    return (inside_rows[:, None] & inside_columns[None, :]).astype(jnp.float32)
