# SPDX-License-Identifier: Apache-2.0
"""The functions between two matrices, by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh", "none"]
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),  # the erf form, as the references have it
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "relu": nn.relu,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}
