# SPDX-License-Identifier: Apache-2.0
"""What every converter needs: reading ``.safetensors``, transposing, and strict assembly."""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config.values import shown

Path = tuple[str, ...]
Transform = Callable[[np.ndarray], np.ndarray]
Variables = dict[str, Any]

# ---------------------------------------------------------------------------- reading

MAX_RANK = 32
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own implementation
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a ``.safetensors`` file, by name. Trusts nothing in it.

    The arrays are read-only views of the mapped file: bytes are read when they are used.

    Raises:
      ValueError: not a well-formed file (header too long or not JSON, unknown dtype, a tensor that
        lies outside the file or in another one, or whose bytes do not fit its shape).
    """
    path = pathlib.Path(path)
    size = path.stat().st_size

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path} is not a well-formed .safetensors file: {what}")

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise wrong(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise wrong(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise wrong("its header is not a JSON object")
    data = np.memmap(path, np.uint8, mode="r")[8 + length :]
    tensors, places = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = np.dtype(DTYPES[entry["dtype"]])
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > MAX_RANK or any(type(n) is not int for n in (*shape, start, stop)):
                raise ValueError(f"want whole numbers, and at most {MAX_RANK} dimensions")
        except (KeyError, TypeError, ValueError) as error:
            raise wrong(f'tensor "{name}" has the entry {shown(entry)} ({shown(error)})') from None
        fits = stop - start == math.prod(shape) * dtype.itemsize and min(shape, default=0) >= 0
        if not fits or not 0 <= start <= stop <= data.size:
            raise wrong(f'tensor "{name}" of shape {shape} does not fit bytes {start} to {stop}')
        tensors[name] = data[start:stop].view(dtype).reshape(shape)
        places.append((start, stop, name))
    places.sort()
    for (_, stop, name), (start, _, other) in itertools.pairwise(places):
        if start < stop:
            raise wrong(f'the bytes of tensor "{name}" are also those of "{other}"')
    return tensors


# ---------------------------------------------------------------------------- transposing


def as_is(array: np.ndarray) -> np.ndarray:
    return array


def dense(weight: np.ndarray) -> np.ndarray:
    """A linear layer [out, in], or a 1x1 convolution [out, in, 1, 1] -> [in, out]."""
    if weight.ndim > 2 and weight.shape[2:] == (1,) * (weight.ndim - 2):
        weight = weight.reshape(weight.shape[:2])
    return weight.T


def convolution(weight: np.ndarray) -> np.ndarray:
    """[out, in, *window] -> [*window, in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def depthwise(weight: np.ndarray) -> np.ndarray:
    """[d, 1, *window] -> [*window, d]."""
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
    """Fills `template` from `state_dict`.

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
        lists = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit {what}: {lists}")
    return variables


def _some(names: list[str], at_most: int = 20) -> str:
    """Each name once; of very many the first, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
