# SPDX-License-Identifier: Apache-2.0
"""RandAugment (arXiv 1909.13719) in NumPy and OpenCV: uint8 in, uint8 out, any number of channels.

Each operation takes the image, a strength and a sign. Strength 1 is AutoAugment's strongest setting
(magnitude 10); RandAugment's larger magnitudes go on in the same direction.

The published codes differ in their operations and in what a magnitude means. `SCALES` has three:

- "own": the paper's fourteen operations, all of which grow with the magnitude.
- "timm": the fifteen of timm's ``rand-m9-mstd0.5-inc1``, with magnitudes of at most 10. VOLO and
  Focal Transformer train with it, each operation applied with probability 0.5.
- "tf": the sixteen of the first implementation, in TensorFlow. There posterize and solarize fade
  with the magnitude (at 15, solarize changes nothing and posterize keeps 6 bits), and the four
  enhancements go from 0.1 (magnitude 0) past 1 (5) to 1.9 (10).

Unlike in those, the background is grey (128), warps are bilinear, and lengths in pixels (100 for
translations, 40 for cutout) are shares of a side of 224.
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

FILL = 128  # grey behind rotated, sheared and moved images
LEVELS = np.arange(256.0)
Operation = Callable[[np.ndarray, float, int], np.ndarray]


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


OPERATIONS: dict[str, Operation] = {
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


def invert(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Inverts all levels."""
    return 255 - image


def solarize_add(image: np.ndarray, strength: float, sign: int) -> np.ndarray:
    """Adds up to 110 (at most 128) to the levels below 128."""
    added = min(128, int(110 * strength))
    return _table(image, np.where(LEVELS < 128, LEVELS + added, LEVELS))


def cutout(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Fills a square with grey: up to 80/224 of a side, at a random centre."""
    height, width = image.shape[:2]
    half = int(strength * 40 / 224 * min(height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    image = image.copy()
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL
    return image


def _keep_bits(image: np.ndarray, bits: int) -> np.ndarray:
    dropped = 8 - min(max(bits, 0), 8)
    return _table(image, (np.arange(256) >> dropped << dropped).astype(float))


def _solarize_from(image: np.ndarray, threshold: int) -> np.ndarray:
    return _table(image, np.where(threshold > LEVELS, LEVELS, 255 - LEVELS))


def _by_factor(enhancement: Operation) -> Operation:
    """Returns `enhancement` by TensorFlow's factor, 0.1 + 1.8 * strength."""
    # `_factor(s, 1)` is 1 + 0.9 s
    return lambda image, strength, sign: enhancement(image, 2 * strength - 1, 1)


_GEOMETRY = {
    name: OPERATIONS[name]
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
}
_LEVELS: dict[str, Operation] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "solarize_add": solarize_add,
}
_ENHANCEMENTS: dict[str, Operation] = {
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}
TIMM: dict[str, Operation] = {
    **_LEVELS,
    **_ENHANCEMENTS,
    **_GEOMETRY,
    "posterize": lambda image, strength, sign: _keep_bits(image, 4 - int(4 * strength)),
    "solarize": lambda image, strength, sign: _solarize_from(image, 256 - int(256 * strength)),
}
TF: dict[str, Operation] = {
    **_LEVELS,
    **{name: _by_factor(operation) for name, operation in _ENHANCEMENTS.items()},
    **_GEOMETRY,
    "posterize": lambda image, strength, sign: _keep_bits(image, int(4 * strength)),
    "solarize": lambda image, strength, sign: _solarize_from(image, int(256 * strength)),
    "cutout": identity,  # `cutout`, which also draws a place
}
SCALES = {"own": OPERATIONS, "timm": TIMM, "tf": TF}
LARGEST = {"own": math.inf, "timm": 10.0, "tf": math.inf}  # magnitude


def randaugment(
    image: np.ndarray,
    layers: int,
    magnitude: float,
    rng: np.random.Generator,
    *,
    scale: str = "own",
    probability: float = 1.0,
    noise: float = 0.0,
) -> np.ndarray:
    """Applies ``layers`` random operations in turn (arXiv 1909.13719, algorithm 1).

    Args:
      magnitude: 0 to 30, on the paper's scale where 10 is AutoAugment's strongest.
      scale: the operations, and what a magnitude means to them, see `SCALES`.
      probability: of each operation to be applied, once it is drawn.
      noise: standard deviation of the magnitude of each operation.

    On the scale "own", unlike in the first implementation, every operation grows with the
    magnitude: posterize keeps fewer bits, solarize inverts more, and the four enhancements leave 1
    in a random direction.
    """
    names = list(SCALES[scale])
    for _ in range(layers):
        name = names[rng.integers(len(names))]
        sign = 1 if rng.random() < 0.5 else -1
        if probability < 1 and rng.random() >= probability:
            continue
        drawn = rng.normal(magnitude, noise) if noise else magnitude
        strength = min(max(drawn, 0.0), LARGEST[scale]) / 10
        if name == "cutout":
            image = cutout(image, strength, rng)
        else:
            image = SCALES[scale][name](image, strength, sign)
    return image
