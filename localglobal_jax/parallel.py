# SPDX-License-Identifier: Apache-2.0
"""Devices: the only file that names them. Mesh, shardings, compilation, hosts, platforms."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over all devices, e.g. ``{"data": -1}``; one axis may be -1, "all that are left".

    Raises ValueError if the axes do not multiply to the number of devices.
    """
    shape = dict(shape or {"data": -1})
    devices = jax.device_count()
    fixed = int(np.prod([n for n in shape.values() if n != -1]))
    free = [axis for axis, n in shape.items() if n == -1]
    if "data" not in shape or len(free) > 1 or fixed < 1 or devices % fixed:
        raise ValueError(
            f"parallel.mesh={shape} does not fit {devices} device(s): it needs an axis named "
            f'"data", at most one axis of -1, and sizes whose product divides {devices}'
        )
    if free:
        shape[free[0]] = devices // fixed
    elif fixed != devices:
        raise ValueError(
            f"parallel.mesh={shape} uses {fixed} of {devices} devices; "
            "set one axis to -1 to use all of them"
        )
    # make_mesh defaults to Explicit axes, under which linen's Embed, Dropout and reshapes break.
    return jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )


def check_batch(batch_size: int, mesh: Mesh, *, what: str = "batch_size") -> None:
    """Raises ValueError unless the global batch divides over hosts and the data axis."""
    for parts, of in ((mesh.shape["data"], "devices on the data axis"), (hosts(), "hosts")):
        if batch_size % parts:
            lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"{what}={batch_size} is not divisible by the {parts} {of}: use {nearest}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis split over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def with_sharding(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Shapes and dtypes of `tree`, with `sharding`: a template to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's slice of a batch -> arrays of the global batch, split over the data axis."""
    sharding = batched(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def compile_init(init: Callable[[], Any], mesh: Mesh) -> Callable[[], Any]:
    """jit of a function without arguments that makes a replicated state.

    Runs once, so it is compiled without optimisation: five times faster for XLA's random numbers.
    """
    return jax.jit(
        init,
        out_shardings=replicated(mesh),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def compile_step(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """jit of ``(state, batch) -> (state, metrics)``; the state is donated and stays replicated."""
    same = replicated(mesh)
    return jax.jit(
        step, in_shardings=(same, batched(mesh)), out_shardings=(same, same), donate_argnums=0
    )


def compile_eval(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """jit of ``(variables, batch) -> metrics``."""
    same = replicated(mesh)
    return jax.jit(step, in_shardings=(same, batched(mesh)), out_shardings=same)


def hosts() -> int:
    """How many processes run this program."""
    return jax.process_count()


def host() -> int:
    """Which of them this is; 0 writes the files."""
    return jax.process_index()


def describe() -> str:
    """E.g. ``"2 x cpu (TFRT_CPU) on 1 host"``."""
    device = jax.devices()[0]
    plural = "" if hosts() == 1 else "s"
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), {hosts()} host{plural}"
    )


def by_platform(*args: Any, default: Callable[..., Any], **platforms: Callable[..., Any]) -> Any:
    """Picks a formulation by the platform that is compiled for, not the one that compiles.

    ``by_platform(x, cpu=f, default=g)``; all must give the same numbers.
    """
    return jax.lax.platform_dependent(*args, default=default, **platforms)
