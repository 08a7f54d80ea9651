# SPDX-License-Identifier: Apache-2.0
"""Adapts variables to another resolution or another number of classes, for fine-tuning.

Both compare the variables with the shapes of the adapted module: the end of its path identifies a
parameter. They work for the models of `create_model`, and for others whose ``__call__`` takes
`train` and, to change the classes, that have a field `classes`.

>>> module = lg.create_model("coatnet", layout="T", depths=(1,), widths=(32,), classes=10)
>>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
>>> def larger(variables):
...     return lg.convert.adapt.resize(module, variables, (64, 64))
>>> table = jax.eval_shape(larger, variables)["params"]["stage1"]["block1"]["attention"]
>>> table["relative_bias"]["table"].shape
(31, 31, 1)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from localglobal_jax.convert import weights
from localglobal_jax.convert.weights import Path, Variables

STEM: Path = ("params", "stem")  # of every image model; begins with its first convolution

DISPLACEMENTS = ("relative_bias", "table")
# End of the path of a parameter [height, width, channels] of a grid -> its two space axes.
PICTURES: dict[Path, tuple[int, int]] = {
    DISPLACEMENTS: (0, 1),
    ("position",): (0, 1),  # VOLO
}


def resize(
    module: nn.Module,
    variables: Mapping[str, Any],
    image_size: int | tuple[int, int],
    *,
    channels: int | None = None,
) -> Variables:
    """Returns the variables of `module` for images of `image_size`, (height, width) or one number.

    `channels`: of the images; None: those of the stem's first convolution, 3 without one.

    Relative tables [2h-1, 2w-1, heads] are resized bilinearly, as CoAtNet's authors do (arXiv
    2106.04803, appendix A.2; half-pixel centres, no antialiasing), so displacement zero stays where
    it was. The displacements' unit thereby stretches with the grid. VOLO's position embedding
    [h, w, d] likewise. A bias computed by an MLP (log-CPB) is not resized.

    Raises:
      ValueError: another parameter depends on the resolution.
    """
    if channels is None:
        first = _first_convolution(_flat(variables))
        channels = first[1].shape[2] if first else 3
    return fit(
        module,
        variables,
        jax.ShapeDtypeStruct((1, *weights.sides(image_size), channels), jnp.float32),
    )


def recolour(variables: Mapping[str, Any], channels: int) -> tuple[Variables, str]:
    """Returns the variables for images of `channels`, 1 or 3, and the change in words, if any.

    As timm does with ``in_chans=1``, the first convolution [height, width, channels, features] is
    summed over three channels, which is exact for grey images that are normalised alike in each.
    From one channel to three, a third of it is repeated, so that a grey image gives the same sums.

    Raises ValueError for other numbers of channels, and for variables without such a convolution.
    """
    flat = _flat(variables)
    first = _first_convolution(flat)
    if not first:
        raise ValueError(f"no convolution below {'/'.join(STEM)}: {_list(flat)}")
    path, change, has = first[0], "", first[1].shape[2]
    if channels != has and {channels, has} != {1, 3}:
        raise ValueError(f"channels={channels}: {'/'.join(path)} has {has}; give 1 or 3")
    if (has, channels) == (3, 1):
        flat[path] = flat[path].sum(2, keepdims=True)
        change = "its first convolution is summed over three colours"
    elif (has, channels) == (1, 3):
        flat[path] = flat[path].repeat(3, 2) / 3
        change = "its first convolution is repeated for three colours, a third each"
    return traverse_util.unflatten_dict(flat), change


def _first_convolution(flat: Mapping[Path, Any]) -> tuple[Path, Any] | None:
    """Returns the path and the kernel of the stem's first convolution; None without one."""
    found = [path for path, leaf in flat.items() if path[:2] == STEM and leaf.ndim == 4]
    return (min(found), flat[min(found)]) if found else None


def fit(
    module: nn.Module, variables: Mapping[str, Any], *inputs: jax.ShapeDtypeStruct
) -> Variables:
    """Returns the variables of `module` for inputs of these shapes: images, or tokens.

    The biases of relative attention over tokens, [2 furthest + 1, heads], are cut, or repeat those
    of the furthest positions, as the operator does.

    The collection "nearest" of a converted Focal Transformer, which `init` does not make, stays. On
    another grid the module does not read it.
    """

    def init(*args: jax.Array) -> Any:
        return module.init(jax.random.key(0), *args, train=False)

    shapes, flat = _flat(jax.eval_shape(init, *inputs)), _flat(variables)
    kept = {path: flat.pop(path) for path in list(flat) if path[0] == "nearest"}
    if shapes.keys() != flat.keys():
        sides = {"it needs": shapes.keys() - flat.keys(), "unknown": flat.keys() - shapes.keys()}
        found = "; ".join(f"{side} {_list(paths)}" for side, paths in sides.items() if paths)
        raise ValueError(f"these are not variables of this module: {found}")
    return traverse_util.unflatten_dict(
        kept | {path: _resize(path, leaf, shapes[path].shape) for path, leaf in flat.items()}
    )


def _resize(path: Path, leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if leaf.shape == shape:
        return leaf
    if path[-2:] == DISPLACEMENTS and leaf.ndim == 2 and leaf.shape[1:] == shape[1:]:
        more = shape[0] - leaf.shape[0]
        half = abs(more) // 2
        return jnp.pad(leaf, ((half, half), (0, 0)), "edge") if more > 0 else leaf[half:-half]
    axes = next((axes for end, axes in PICTURES.items() if path[-len(end) :] == end), None)
    kept = (
        axes
        and leaf.ndim == 3
        and all(
            old == new or axis in axes
            for axis, (old, new) in enumerate(zip(leaf.shape, shape, strict=True))
        )
    )
    if not kept:
        raise ValueError(
            f"{'/'.join(path)} has shape {leaf.shape} and would need {shape}: it cannot be resized"
        )
    return jax.image.resize(leaf, shape, "bilinear", antialias=False)


def reclassify(
    module: nn.Module, variables: Mapping[str, Any], classes: int
) -> tuple[nn.Module, Variables]:
    """Returns module and variables with `classes` outputs (0: none); every classifier is zero.

    A classifier is a submodule whose name ends in "classifier", and classes are the last axis of
    its parameters. A zero classifier gives all classes the same logit and has a gradient.

    Raises:
      ValueError: there is no classifier to replace.
    """
    flat = _flat(variables)
    old = {path for path in flat if _of_classifier(path)}
    if not old:
        raise ValueError(
            f"no parameter belongs to a classifier: {_list(flat)}; `adapt.add_classifier` adds one"
        )
    new = {
        path: jnp.zeros((*leaf.shape[:-1], classes), leaf.dtype) if path in old else leaf
        for path, leaf in flat.items()
        if classes or path not in old
    }
    return module.clone(classes=classes), traverse_util.unflatten_dict(new)


def choose_classes(
    module: nn.Module, variables: Mapping[str, Any], rows: Sequence[int]
) -> tuple[nn.Module, Variables]:
    """Returns module and variables whose class i is class ``rows[i]`` of those given.

    Raises ValueError for a class that there is not, and without a classifier.
    """
    flat, known = _flat(variables), getattr(module, "classes", 0)
    if not any(map(_of_classifier, flat)):
        raise ValueError(f"no parameter belongs to a classifier: {_list(flat)}")
    if wrong := [row for row in rows if not 0 <= row < known]:
        raise ValueError(f"rows={wrong}: the module has the classes 0 to {known - 1}")
    if not rows:
        raise ValueError("rows=[]: `reclassify` with classes=0 removes the classifier")
    index = jnp.asarray(rows, jnp.int32)
    chosen = {
        path: leaf[..., index] if _of_classifier(path) else leaf for path, leaf in flat.items()
    }
    return module.clone(classes=len(rows)), traverse_util.unflatten_dict(chosen)


def add_classifier(
    module: nn.Module,
    variables: Mapping[str, Any],
    classes: int,
    *inputs: jax.ShapeDtypeStruct,
) -> tuple[nn.Module, Variables]:
    """Returns a module without a classifier and its variables, with one of zeros.

    `inputs` are shapes of a batch, which the shapes of the classifier are computed from.
    """
    module = module.clone(classes=classes)
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, train=False), *inputs)
    new = {
        path: jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in _flat(shapes).items()
        if _of_classifier(path)
    }
    return module, traverse_util.unflatten_dict({**_flat(variables), **new})


def _of_classifier(path: Path) -> bool:
    return len(path) > 1 and path[-2].endswith("classifier")


def _flat(variables: Mapping[str, Any]) -> dict[Path, Any]:
    return traverse_util.flatten_dict(dict(variables))


def _list(paths: Iterable[Path]) -> str:
    return weights.some(sorted("/".join(path) for path in paths), 8) or "none"
