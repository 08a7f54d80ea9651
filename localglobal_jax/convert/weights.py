# SPDX-License-Identifier: Apache-2.0
"""Tools of every converter: reading ``.safetensors``, transposing, and strict assembly."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from localglobal_jax.config.values import shown

Path = tuple[str, ...]
Transform = Callable[[np.ndarray], np.ndarray]
Variables = dict[str, Any]

# ---------------------------------------------------------------------------- reading


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns ``img_size``, a number or (height, width), as (height, width).

    Raises ValueError for another number of sides.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"img_size={size}: give a number or (height, width)")
    return pair


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a ``.safetensors`` file by name, as arrays in memory.

    Raises:
      ValueError: the file is malformed (the library's checks: header, offsets, overlaps, sizes), or
        holds a dtype that NumPy and ml_dtypes do not have (8-bit floats).

    >>> import safetensors.numpy
    >>> safetensors.numpy.save_file({"head.bias": np.zeros(10)}, "model.safetensors")
    >>> state_dict = lg.convert.weights.read_safetensors("model.safetensors")
    >>> state_dict["head.bias"].shape
    (10,)
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (safetensors.SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid .safetensors file: {shown(str(error))}") from None


# ---------------------------------------------------------------------------- transposing


def as_is(array: np.ndarray) -> np.ndarray:
    return array


def dense(weight: np.ndarray) -> np.ndarray:
    """Returns a linear layer [out, in] or a 1x1 convolution [out, in, 1, 1] as [in, out]."""
    if weight.ndim > 2 and weight.shape[2:] == (1,) * (weight.ndim - 2):
        weight = weight.reshape(weight.shape[:2])
    return weight.T


def convolution(weight: np.ndarray) -> np.ndarray:
    """Returns [out, in, *window] as [*window, in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def depthwise(weight: np.ndarray) -> np.ndarray:
    """Returns [d, 1, *window] as [*window, d]."""
    return np.moveaxis(weight, 0, -1)[0]


# ---------------------------------------------------------------------------- assembly


def assemble(
    template: Variables,
    state_dict: Mapping[str, Any],
    source: Callable[[Path, tuple[int, ...]], tuple[str, Transform]],
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    what: str = "the model",
) -> Variables:
    """Returns `template` filled from `state_dict`.

    Args:
      template: variables of a module, as shapes (``jax.eval_shape``) or arrays.
      state_dict: name -> array.
      source: path of a leaf, e.g. ``("params", "stem", "conv1", "kernel")``, and its shape -> the
        name of its array and how to bring that to our layout.
      ignored: names that are left over on purpose.
      what: the name of the model, for the error.

    Raises:
      ValueError: names are missing or left over, or shapes differ; lists them, once each.
    """
    missing, shapes, used = [], [], set()

    def fill(path: Any, leaf: Any) -> Any:
        name, transform = source(tuple(key.key for key in path), leaf.shape)
        used.add(name)
        if name not in state_dict:
            missing.append(name)
            return None
        array = np.asarray(state_dict[name])
        try:
            value = transform(array)
        except (ValueError, IndexError):  # not even of the right rank
            value = array
        if value.shape != leaf.shape:
            ours = "/".join(key.key for key in path[1:])
            shapes.append(f"{name} {array.shape} (for {ours} {leaf.shape})")
            return None
        return jnp.asarray(value, leaf.dtype)

    variables = jax.tree.map_with_path(fill, template)
    left_over = [name for name in state_dict if name not in used and not ignored(name)]
    problems = {"missing": missing, "left over": left_over, "of another shape": shapes}
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit {what}: {lists}")
    return variables


def disassemble(
    variables: Variables,
    source: Callable[[Path, tuple[int, ...]], tuple[str, Transform]],
    shape: Callable[[Path, tuple[int, ...]], tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Returns the state dict from which `assemble` makes `variables`: its inverse, bit for bit.

    Args:
      variables: of a module.
      source: as for `assemble`. A transform only moves elements, so that the place of each one is
        found by transforming the numbers of the places.
      shape: path of a leaf, and its shape -> the shape of its array in the state dict.
    """
    state = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        path = tuple(key.key for key in keys)
        name, transform = source(path, leaf.shape)
        places = transform(np.arange(leaf.size).reshape(shape(path, leaf.shape)))
        if places.shape != leaf.shape:
            raise AssertionError(f"{name}: {places.shape}, not {leaf.shape} of {'/'.join(path)}")
        array = np.empty(leaf.size, leaf.dtype)
        array[places.reshape(-1)] = np.asarray(leaf).reshape(-1)
        state[name] = array.reshape(shape(path, leaf.shape))
    return state


def with_batch_counts(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the ``num_batches_tracked`` of torch's BatchNorms, as 0: no model reads them."""
    ending = "running_mean"
    counts = {
        f"{name.removesuffix(ending)}num_batches_tracked": np.zeros((), np.int64)
        for name in state
        if name.endswith(f".{ending}")
    }
    return {**state, **counts}


def some(names: list[str], at_most: int = 20) -> str:
    """Returns each name once: the first `at_most`, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
