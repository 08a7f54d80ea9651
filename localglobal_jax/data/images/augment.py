# SPDX-License-Identifier: Apache-2.0
"""Crops, flips and erasing of images on the host: uint8 in, uint8 out, NumPy and OpenCV only.

First the functions of a whole batch, given its random numbers; then those of one image, given a
generator. OpenCV's own threads are off: images are already spread over threads one by one.
"""

import functools
import math

import cv2
import numpy as np
import scipy.sparse

cv2.setNumThreads(0)

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


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns ``[h, w, c]`` resized to ``[*size, c]``: area averages to shrink, else cubic."""
    if image.shape[:2] == tuple(size):
        return image
    shrink = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    how = cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
    out = cv2.resize(image, (size[1], size[0]), interpolation=how)
    return out.reshape(*size, image.shape[2])  # OpenCV drops a single channel


def center_crop(image: np.ndarray, size: tuple[int, int], fraction: float) -> np.ndarray:
    """Returns the middle ``fraction`` of the image in the aspect of ``size``, resized to ``size``.

    The same as resizing the short side to ``size / fraction`` and cutting out the centre.
    """
    top, left, h, w = center_box((image.shape[0], image.shape[1]), size, fraction)
    return resize(image[top : top + h, left : left + w], size)


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


def resize_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns `resize`, faster where it shrinks, its pixels within one level.

    OpenCV averages areas one number at a time. The averages of rows, then those of columns, are
    products with sparse matrices, which are vectorised.
    """
    h, w, channels = image.shape
    if not (size[0] <= h and size[1] <= w) or size == (h, w):
        return resize(image, size)
    rows = image.reshape(h, w * channels).astype(np.float32)
    out = _area_weights(h, size[0]) @ rows
    out = cv2.transpose(out.reshape(size[0], w, channels)).reshape(w, size[0] * channels)
    out = _area_weights(w, size[1]) @ out
    out = cv2.transpose(out.reshape(size[1], size[0], channels)).reshape(*size, channels)
    return np.rint(out, out=out).astype(np.uint8)


@functools.lru_cache(maxsize=1024)  # one is read by many threads, and written by none
def _area_weights(before: int, after: int) -> scipy.sparse.csr_matrix:
    """Returns ``[after, before]``: the share of each old pixel in each new one."""
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
