# SPDX-License-Identifier: Apache-2.0
"""Dense layers: flax's, whose products have two axes each where that is faster.

The gradient of a kernel contracts all axes but the last of x and of what comes back. XLA on CPU
makes that a product of matrices by writing what comes back transposed, through strides of a whole
image: 19 % of a training step of CoAtNet-0. Of matrices from the start, it reads both as they lie.
"""

from functools import partial
from typing import Any

import flax.linen as nn
from jax import lax
from jaxtyping import Array, Float

from localglobal_jax.parallel import placement

Numbers = tuple[tuple[Any, Any], tuple[Any, Any]]


def dot_general(x: Array, kernel: Array, numbers: Numbers, **options: Any) -> Array:
    """`lax.dot_general`; if it sums over the last axis of x and the first of kernel, see above."""

    def as_given(x: Array, kernel: Array) -> Array:
        return lax.dot_general(x, kernel, numbers, **options)

    def of_matrices(x: Array, kernel: Array) -> Array:
        y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
        return y.reshape(*x.shape[:-1], *kernel.shape[1:])

    (summed, batch) = numbers
    if any(map(len, batch)) or tuple(map(tuple, summed)) != ((x.ndim - 1,), (0,)):
        return as_given(x, kernel)
    return placement.by_platform(x, kernel, cpu=of_matrices, default=as_given)


def product(
    x: Float[Array, "*rows d"], kernel: Float[Array, " d *columns"], **options: Any
) -> Float[Array, "*_"]:
    """``x @ kernel``, summed over the last axis of x and the first of kernel."""
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)


Dense = partial(nn.Dense, dot_general=dot_general)
DenseGeneral = partial(nn.DenseGeneral, dot_general=dot_general)
