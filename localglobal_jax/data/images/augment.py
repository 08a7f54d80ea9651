# SPDX-License-Identifier: Apache-2.0
"""Crops, flips and erasing of images on the host: uint8 in, uint8 out, NumPy and OpenCV only.

First the functions of a whole batch, given its random numbers; then those of one image, given a
generator. OpenCV's own threads are off: images are already spread over threads one by one.
"""

import functools
import math
from typing import Any

import cv2
import numpy as np

cv2.setNumThreads(0)

WHOLE = 16  # times the pixels of a crop, up to which the image around it is resized too
PILLOW = ("bilinear", "bicubic")  # interpolations, antialiased
TRIES = 10  # to fit a random rectangle before giving up
ASPECT = (3 / 4, 4 / 3)  # of a resized crop
ERASED_AREA = (0.02, 0.4)  # arXiv 1708.04896, section 4.1.1
ERASED_ASPECT = (0.3, 1 / 0.3)


# ---------------------------------------------------------------------------------- whole batches


def pad_crop(images: np.ndarray, pad: int, uniform: np.ndarray) -> np.ndarray:
    """Pads by ``pad`` zeros on each side, then cuts each image at a random offset.

    ``images: [b, h, w, c]``, ``uniform: [b, 2]`` in [0, 1) -> ``[b, h, w, c]``.
    """
    b, h, w, c = images.shape
    padded = np.zeros((b, h + 2 * pad, w + 2 * pad, c), images.dtype)
    padded[:, pad : pad + h, pad : pad + w] = images
    top, left = (uniform * (2 * pad + 1)).astype(np.intp).T
    out = np.empty_like(images)
    for i in range(b):  # plain slices: twice as fast as one fancy index over all pixels
        out[i] = padded[i, top[i] : top[i] + h, left[i] : left[i] + w]
    return out


def flip(images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Mirrors left and right where ``uniform [b]`` is below a half."""
    out = images.copy()
    for i in np.flatnonzero(uniform < 0.5):
        out[i] = cv2.flip(images[i], 1).reshape(out[i].shape)
    return out


# ------------------------------------------------------------------------------------- one image


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str = "area") -> np.ndarray:
    """Returns ``[h, w, c]`` resized to ``[*size, c]``.

    `interpolation`: one of `PILLOW`; or "area", which first averages areas along the sides that
    shrink, then is cubic along those that grow.
    """
    if image.shape[:2] == tuple(size):
        return image
    if interpolation in PILLOW:
        return _resample(image, size, interpolation)
    channels, shrunk = image.shape[2], (min(size[0], image.shape[0]), min(size[1], image.shape[1]))
    for sides, how in ((shrunk, cv2.INTER_AREA), (size, cv2.INTER_CUBIC)):
        if image.shape[:2] != tuple(sides):
            image = cv2.resize(image, (sides[1], sides[0]), interpolation=how)
    return image.reshape(*size, channels)  # OpenCV drops a single channel


def _resample(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Returns ``[h, w, c]``, or its ``box`` (left, top, right, bottom), resized to ``[*size, c]``.

    By Pillow; pixels around the box count at its edges.
    """
    from PIL import Image  # noqa: PLC0415, only where it is used

    how = Image.Resampling[interpolation.upper()]

    def resized(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(picture.resize(size[::-1], how, box))

    if image.shape[2] == 3:
        return resized(image)
    return np.stack([resized(image[..., i]) for i in range(image.shape[2])], -1)


def center_crop(
    image: np.ndarray, size: tuple[int, int], fraction: float, interpolation: str = "area"
) -> np.ndarray:
    """Returns the middle ``fraction`` of the image in the aspect of ``size``, resized to ``size``.

    The same as resizing the short side to ``size / fraction`` and cutting out the centre. Above 1,
    the border is black. With an interpolation of `PILLOW`, sizes and offsets are rounded as timm
    and torchvision round them.
    """
    if interpolation in PILLOW:
        return _timm_crop(image, size, fraction, interpolation)
    top, left, h, w = center_box((image.shape[0], image.shape[1]), size, fraction)
    if top < 0 or left < 0:
        above, before = max(0, -top), max(0, -left)
        below, behind = max(0, h - image.shape[0] - above), max(0, w - image.shape[1] - before)
        image = np.pad(image, ((above, below), (before, behind), (0, 0)))
        top, left = max(0, top), max(0, left)
    return resize(image[top : top + h, left : left + w], size)


def _timm_crop(
    image: np.ndarray, size: tuple[int, int], fraction: float, interpolation: str
) -> np.ndarray:
    """Returns `center_crop` as ``transforms_imagenet_eval`` of timm (``crop_mode="center"``)."""
    shape = image.shape[:2]
    # of the whole image, as far as the side limits its scale
    target = [max(1, math.floor(side / fraction)) for side in size]
    if target[0] == target[1]:  # torchvision's Resize
        scaled = [target[0] * side // min(shape) for side in shape]
    else:  # timm's ResizeKeepRatio
        ratio = min(side / want for side, want in zip(shape, target, strict=True))
        scaled = [max(1, round(side / ratio)) for side in shape]
    out = np.zeros((*size, image.shape[2]), np.uint8)
    inside, seen, box = [], [], []
    for side, whole, want in zip(shape, scaled, size, strict=True):
        count, border = min(whole, want), max(0, want - whole) // 2
        start = round(max(0, whole - want) / 2)
        inside.append(slice(border, border + count))
        seen.append(slice(start, start + count))
        box.append((start * side / whole, min(side, (start + count) * side / whole)))
    if math.prod(scaled) <= WHOLE * math.prod(size):
        found = resize(image, (scaled[0], scaled[1]), interpolation)[tuple(seen)]
    else:  # a very long image
        counts = [part.stop - part.start for part in seen]
        edges = box[1][0], box[0][0], box[1][1], box[0][1]
        found = _resample(image, (counts[0], counts[1]), interpolation, edges)
    out[tuple(inside)] = found
    return out


def center_box(
    shape: tuple[int, int], size: tuple[int, int], fraction: float
) -> tuple[int, int, int, int]:
    """Returns ``(top, left, height, width)`` of `center_crop` in an image of ``shape``."""
    h, w = shape
    scale = min(h / size[0], w / size[1]) * fraction
    ch, cw = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (h - ch) // 2, (w - cw) // 2, ch, cw


def random_box(
    shape: tuple[int, int],
    size: tuple[int, int],
    area: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Returns a random rectangle ``(top, left, height, width)`` (arXiv 1409.4842, section 6).

    Its share of the image is uniform in ``area``, its aspect log-uniform in `ASPECT`. If none fits
    in `TRIES`, it is the central one in the aspect of ``size``.
    """
    h, w = shape
    for _ in range(TRIES):
        pixels = h * w * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        ch, cw = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < ch <= h and 0 < cw <= w:
            top, left = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
            return int(top), int(left), ch, cw
    return center_box(shape, size, 1.0)


def resize_crop(
    image: np.ndarray, size: tuple[int, int], interpolation: str = "area"
) -> np.ndarray:
    """Returns `resize`, faster where it averages areas, its pixels within one level.

    OpenCV averages areas one number at a time. The averages of rows, then those of columns, are
    products with sparse matrices, which are vectorised.
    """
    h, w, channels = image.shape
    if interpolation != "area" or not (size[0] <= h and size[1] <= w) or size == (h, w):
        return resize(image, size, interpolation)
    rows = image.reshape(h, w * channels).astype(np.float32)
    out = _area_weights(h, size[0]) @ rows
    out = cv2.transpose(out.reshape(size[0], w, channels)).reshape(w, size[0] * channels)
    out = _area_weights(w, size[1]) @ out
    out = cv2.transpose(out.reshape(size[1], size[0], channels)).reshape(*size, channels)
    return np.rint(out, out=out).astype(np.uint8)


@functools.lru_cache(maxsize=1024)  # one is read by many threads, and written by none
def _area_weights(before: int, after: int) -> Any:
    """Returns the sparse ``[after, before]``: the share of each old pixel in each new one."""
    import scipy.sparse  # noqa: PLC0415 # only where it is used

    scale = before / after
    start = np.arange(after)[:, None] * scale
    at = start.astype(np.int32) + np.arange(math.ceil(scale) + 1, dtype=np.int32)
    share = np.minimum(at + 1, start + scale) - np.maximum(at, start)
    share = np.clip(share, 0, None) / scale
    ends = np.arange(after + 1, dtype=np.int32) * at.shape[1]
    inside = np.minimum(at, before - 1)  # beyond it the share is 0, but for rounding
    return scipy.sparse.csr_matrix(
        (share.ravel().astype(np.float32), inside.ravel(), ends), shape=(after, before)
    )


def random_erase(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Fills a random rectangle with random pixels (arXiv 1708.04896, algorithm 1)."""
    if rng.random() >= probability:
        return image
    h, w, c = image.shape
    for _ in range(TRIES):
        pixels = h * w * rng.uniform(*ERASED_AREA)
        aspect = rng.uniform(*ERASED_ASPECT)
        eh, ew = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < eh <= h and 0 < ew <= w:
            top, left = rng.integers(h - eh + 1), rng.integers(w - ew + 1)
            image = image.copy()
            noise = rng.integers(0, 256, (eh, ew, c), np.uint8)
            image[top : top + eh, left : left + ew] = noise
            return image
    return image
