# SPDX-License-Identifier: Apache-2.0
"""Sharding rules: the mesh axes that split the axes of a parameter."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "model")
SMALL = 2**14  # elements: splitting less than this costs more messages than it saves memory

# End of a parameter's path -> the axis that "model" splits: the way out of a product, then the way
# in of the next, so that only its result has to be summed over devices.
TENSOR_RULES = (
    (r"/(qkv|query|key_value|outlook/value)/(kernel|bias)", -2),  # heads
    (r"/outlook/weights/(kernel|bias)", -3),
    (r"/(attention|cross|outlook)/output/kernel", -2),
    (r"/(hidden|expand)/(kernel|bias)", -1),
    (r"/depthwise/kernel", -1),
    (r"/(mlp/output|pointwise|project)/kernel", -2),
    (r"(^|/)\w*embedding/embedding", 0),  # vocabulary
)


def spec(
    path: str, shape: tuple[int, ...], strategy: str, mesh: Mapping[str, int]
) -> PartitionSpec:
    """Returns the spec of an array: by the table over "model", by its size over "fsdp".

    The optimizer's moments have the paths of their parameters at the end of theirs.
    """
    axes: list[str | None] = [None] * len(shape)
    if "tensor" in strategy:
        for pattern, axis in TENSOR_RULES:
            found = re.search(f"{pattern}$", path)
            if found and shape[axis] % mesh["model"] == 0:
                axes[axis] = "model"
                break
    # A depthwise kernel split by channels makes XLA split its convolution's gradient alike: whole
    # batches were then summed over all devices (49 GiB each in coatnet_7).
    large = np.prod(shape) >= SMALL and not path.endswith("depthwise/kernel")
    if "fsdp" in strategy and large:
        whole = [i for i, n in enumerate(shape) if axes[i] is None and n % mesh["fsdp"] == 0]
        if whole:
            axes[max(whole, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, parts: NamedSharding, whole: NamedSharding) -> jax.Array:
    """Gathers a sharded `x`; its gradient is scattered again.

    The transpose of a sharding constraint is the same one: it would sum the whole gradient on every
    device, twice what summing parts sends.
    """
    del parts
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(x: jax.Array, parts: NamedSharding, whole: NamedSharding) -> Any:
    return gather(x, parts, whole), None


def _gather_backward(parts: NamedSharding, whole: NamedSharding, _: None, g: jax.Array) -> Any:
    del whole
    return (jax.lax.with_sharding_constraint(g, parts),)


gather.defvjp(_gather_forward, _gather_backward)
