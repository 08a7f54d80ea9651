# SPDX-License-Identifier: Apache-2.0
"""Compiles one module with its gradient for one device that need not be here."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from localglobal_jax.parallel import context
from localglobal_jax.profiling import compile as compilation
from localglobal_jax.profiling.topologies import Topology


def compiled(
    module: nn.Module,
    shape: tuple[int, ...],
    topology: Topology,
    implementation: context.Implementation,
    *,
    mask: bool = False,
) -> Any:
    """Returns the compiled forward and backward pass of a module in training, in bfloat16.

    Args:
      module: called with an array of `shape`, ``train=True`` and, if `mask`, a mask of its first
        two axes.
      topology: the program is for its first device.
      implementation: of the operators.
    """
    jax.clear_caches()  # of what another form has traced
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    options: dict[str, Any] = {"mask": jnp.ones(shape[:2], bool)} if mask else {}
    rngs = {"dropout": jax.random.key(1)}

    def apply(variables, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs, **options)

    def step(params, others, x, g):
        y, back, new = jax.vjp(
            lambda params, x: apply({"params": params, **others}, x), params, x, has_aux=True
        )
        return new, back((jnp.cos(y) * g).astype(y.dtype))

    def init(x):
        return module.init({"params": jax.random.key(0), **rngs}, x, train=False, **options)

    with context.implementation(implementation):
        variables = jax.eval_shape(init, x)
        y, _ = jax.eval_shape(apply, variables, x)
        others = {k: v for k, v in variables.items() if k != "params"}
        args = _on_device((variables["params"], others, x, y), topology)
        return jax.jit(step).lower(*args).compile()


def _on_device(tree, topology):
    """Gives shapes the device that they are compiled for."""
    where = SingleDeviceSharding(compilation.devices_of(topology)[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
