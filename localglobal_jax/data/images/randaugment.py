# SPDX-License-Identifier: Apache-2.0
"""RandAugment (arXiv 1909.13719) in NumPy and OpenCV: uint8 in, uint8 out, any number of channels.

Each operation takes the image, a strength and a sign. Strength 1 is AutoAugment's strongest setting
(magnitude 10); RandAugment's larger magnitudes go on in the same direction.
"""

import functools
from collections.abc import Callable

import cv2
import numpy as np

FILL = 128  # grey behind rotated, sheared and moved images
LEVELS = np.arange(256.0)


def _table(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Maps each grey level through 256 ``values``."""
    lookup = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return cv2.LUT(image, lookup).reshape(image.shape)


def _factor(strength: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * strength)


def _warp(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    h, w, c = image.shape
    out = cv2.warpAffine(
        image, np.array(matrix, np.float64), (w, h), flags=cv2.INTER_LINEAR, borderValue=(FILL,) * 4
    )
    return out.reshape(h, w, c)


def identity(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Returns the image; the first of the fourteen operations."""
    return image


def autocontrast(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Stretches each channel to the full range."""
    out = np.empty_like(image)
    for k in range(image.shape[2]):
        channel = np.ascontiguousarray(image[..., k])
        low, high = int(channel.min()), int(channel.max())
        scale = 255 / (high - low) if high > low else 1
        out[..., k] = _table(channel, (LEVELS - low) * scale) if high > low else channel
    return out


def equalize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Flattens each channel's histogram."""
    channels = [cv2.equalizeHist(np.ascontiguousarray(c)) for c in np.moveaxis(image, 2, 0)]
    return np.stack(channels, axis=2)


def rotate(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Rotates by up to 30 degrees about the centre."""
    h, w = image.shape[:2]
    centre = ((w - 1) / 2, (h - 1) / 2)
    return _warp(image, cv2.getRotationMatrix2D(centre, sign * 30 * strength, 1.0).tolist())


def solarize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Inverts levels above a threshold."""
    kept = np.arange(256) < 256 * (1 - strength)
    return _table(image, np.where(kept, LEVELS, 255 - LEVELS))


def posterize(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Keeps the highest bits: eight at strength zero, four at one."""
    dropped = min(7, round(4 * strength))
    return _table(image, (np.arange(256) >> dropped << dropped).astype(float))


def color(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Moves from or towards the greyscale image; returns images without three channels as given."""
    if image.shape[2] != 3:
        return image
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    factor = _factor(strength, sign)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def contrast(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Moves from or towards the mean grey level."""
    factor = _factor(strength, sign)
    return _table(image, image.mean() + factor * (LEVELS - image.mean()))


def brightness(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Moves from or towards black."""
    return _table(image, LEVELS * _factor(strength, sign))


def sharpness(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Moves from or towards a smoothed image; the outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    blurred = cv2.filter2D(image, -1, kernel).reshape(image.shape)
    smooth[1:-1, 1:-1] = blurred[1:-1, 1:-1]
    factor = _factor(strength, sign)
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0).reshape(image.shape)


def shear(image: np.ndarray, strength: float, sign: int, *, axis: int) -> np.ndarray:
    """Shears by up to 0.3 along x (``axis=1``) or y (``axis=0``)."""
    amount = sign * 0.3 * strength
    return _warp(image, [[1, amount, 0], [0, 1, 0]] if axis else [[1, 0, 0], [amount, 1, 0]])


def translate(image: np.ndarray, strength: float, sign: int, *, axis: int) -> np.ndarray:
    """Translates by up to 45 % of the side: the paper's 100 of 224 pixels."""
    amount = sign * 0.45 * strength * image.shape[axis]
    return _warp(image, [[1, 0, amount], [0, 1, 0]] if axis else [[1, 0, 0], [0, 1, amount]])


OPERATIONS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "identity": identity,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "rotate": rotate,
    "solarize": solarize,
    "color": color,
    "posterize": posterize,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": functools.partial(shear, axis=1),
    "shear_y": functools.partial(shear, axis=0),
    "translate_x": functools.partial(translate, axis=1),
    "translate_y": functools.partial(translate, axis=0),
}


def randaugment(
    image: np.ndarray, layers: int, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Applies ``layers`` random operations of `OPERATIONS` in turn (arXiv 1909.13719, algorithm 1).

    ``magnitude``: 0 to 30, on the paper's scale where 10 is AutoAugment's strongest. Unlike the
    first implementation, and like those that DeiT and VOLO train with, every operation grows with
    it: posterize keeps fewer bits, solarize inverts more, and the four enhancements leave 1 in a
    random direction (there they go from 0.1 up to 1.9, so that a low magnitude distorts most).
    """
    operations = list(OPERATIONS.values())
    for _ in range(layers):
        operation = operations[rng.integers(len(operations))]
        image = operation(image, magnitude / 10, 1 if rng.random() < 0.5 else -1)
    return image
