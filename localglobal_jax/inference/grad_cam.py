# SPDX-License-Identifier: Apache-2.0
"""Grad-CAM (arXiv 1610.02391): which places of an image raise the score of a class, and drawing.

The map is the sum of the channels of a stage, each weighted by its mean gradient. Attention weights
are not needed, so that the method is the same for convolution, attention and their mixtures. A
global block can move evidence from one place to another. A map taken behind it shows where the
evidence is in the features. A map taken before it (an earlier stage: finer, less specific to the
class) shows where the evidence is in the image.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from localglobal_jax.parallel import context

SHOWN = (384, 1024)  # pixels: smallest and largest longer side of a drawn image
BRIGHTEST = 225  # of the 255 levels of the colour map
OPAQUE = 0.65  # of the colours where the map is largest
UNSEEN = 0.35  # brightness outside the crop that the model received


def grad_cam(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: Float[Array, "b h w c"],
    stage: int | None = None,
) -> tuple[Float[Array, "b classes"], Float[Array, "b i j"]]:
    """Returns the logits and a map per image for its likeliest class; equations 1 and 2.

    `module` returns ``(logits, {"stage1": ..., "stage2": ...})``, outputs [b, i, j, d] of the
    submodules of these names. The map is that of `stage`, by default the last one. It is at least
    0, and its scale has no meaning. Raises ValueError for a stage that does not exist.
    """

    def apply(x: Array) -> Any:
        with context.implementation(context.chosen_implementation("fused")):
            return module.apply(variables, x, train=False)

    shapes = jax.eval_shape(apply, images)[1]
    stages = sum(name.startswith("stage") for name in shapes)
    name = f"stage{stages if stage is None else stage}"
    if name not in shapes:
        raise ValueError(f"stage={stage}: the model has the stages 1 to {stages}")

    def score(change: Array) -> tuple[Array, Any]:
        def changed(call: Any, args: Any, kwargs: Any, called: Any) -> Any:
            y = call(*args, **kwargs)
            here = called.module.path == (name,) and called.method_name == "__call__"
            return y + change if here else y

        with nn.intercept_methods(changed):  # no change to the models
            logits, found = apply(images)
        # images are independent, so the gradient of the sum is the gradient of each
        return logits.max(-1).sum(), (logits, found[name])

    nothing = jnp.zeros(shapes[name].shape, shapes[name].dtype)
    gradient, (logits, features) = jax.grad(score, has_aux=True)(nothing)
    weight = gradient.astype(jnp.float32).mean((1, 2))
    return logits, nn.relu(jnp.einsum("bijd,bd->bij", features.astype(jnp.float32), weight))


def shrunk(picture: np.ndarray) -> np.ndarray:
    """Returns the image ``uint8 [h, w, c]``, reduced to the size at which it is drawn."""
    return _resized(picture, min(1.0, SHOWN[1] / max(picture.shape[:2])), cv2.INTER_AREA)


def overlay(
    picture: np.ndarray,
    looked: np.ndarray,
    seen: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> np.ndarray:
    """Draws the image in grey with the map in colour: yellow is highest, then red, then violet.

    Args:
      picture: ``uint8 [h, w, c]``.
      looked: the map ``[i, j]``, at least 0; of any scale.
      seen: the crop that the map covers, ``(top, left, height, width)`` as fractions of the sides
        of the image, which it may exceed. The rest of the image is drawn dark.
    """
    scale = max(1.0, SHOWN[0] / max(picture.shape[:2]))
    picture = _resized(shrunk(picture), scale, cv2.INTER_NEAREST)
    if picture.shape[2] == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    grey = picture.reshape(*picture.shape[:2], 1)
    out = (grey * np.ones(3) * UNSEEN).astype(np.float32)
    h, w = grey.shape[:2]
    top, left = round(seen[0] * h), round(seen[1] * w)
    bottom = max(top + 1, round((seen[0] + seen[2]) * h))
    right = max(left + 1, round((seen[1] + seen[3]) * w))
    heat: np.ndarray = looked.astype(np.float32) / max(float(looked.max()), 1e-30)
    heat = cv2.resize(heat, (right - left, bottom - top), interpolation=cv2.INTER_CUBIC)
    inside = slice(max(0, top), min(h, bottom)), slice(max(0, left), min(w, right))
    heat = heat[inside[0].start - top : inside[0].stop - top]
    heat = heat[:, inside[1].start - left : inside[1].stop - left]
    shares = np.clip(heat, 0, 1)  # cubic overshoots
    # The map's last, pale colours would be grey on black.
    levels = (BRIGHTEST * shares).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    share = OPAQUE * shares[..., None]
    out[inside] = (1 - share) * grey[inside] + share * colours
    return out.round().astype(np.uint8)


def _resized(picture: np.ndarray, scale: float, how: int) -> np.ndarray:
    if scale == 1:
        return picture
    h, w, c = picture.shape
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return cv2.resize(picture, size, interpolation=how).reshape(*size[::-1], c)
