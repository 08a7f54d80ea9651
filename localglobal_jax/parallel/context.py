# SPDX-License-Identifier: Apache-2.0
"""Trace-time settings that a step gives to the models inside it: models do not name devices.

Each setting is a context variable that is read while a function is traced. `placement.Partitioner`
sets them for the steps it compiles. Outside of a step every function here is the identity, and
operators use their reference implementation. Imports nothing of this package.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

import jax
from jaxtyping import Array, PyTree

Implementation = Literal["reference", "fused"]


class StackOptions(NamedTuple):
    """Options for computing consecutive blocks, see `blocks.stack`."""

    remat: bool = False
    scan: bool = False
    # Gathers the sharded parameters of a block when it is computed, and again in its backward pass.
    # Without it XLA gathered activations instead.
    gather: Callable[[PyTree], PyTree] | None = None


_edge: ContextVar[Callable[[Array], Array]] = ContextVar("edge", default=lambda x: x)
_whole: ContextVar[Callable[..., Array]] = ContextVar("whole", default=lambda x, *_: x)
_state: ContextVar[Callable[[PyTree], PyTree]] = ContextVar("state", default=lambda x: x)
_axis: ContextVar[str | None] = ContextVar("axis", default=None)
_norm_axis: ContextVar[str | None] = ContextVar("norm_axis", default=None)
_stack_options: ContextVar[StackOptions | None] = ContextVar("stack_options", default=None)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_implementation: ContextVar[Implementation | None] = ContextVar("implementation", default=None)


@contextlib.contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Context manager that selects the implementation of the operators traced inside it.

    "reference" (the default) is the paper's equation with JAX's own derivatives: `jax.jvp`,
    `jax.jacfwd`, `jax.hessian`, `jax.linearize` and `jax.vmap` work. "fused" gives the same numbers
    and moves fewer bytes. Its derivatives are written by hand for reverse mode alone, so `jax.jvp`
    and what builds on it raise TypeError. Train, eval and decode steps of this package use "fused".

    The choice is read while a function is traced. A function that `jax.jit` has compiled keeps the
    implementation it was traced with, so jit a function of its own for each.

    Raises ValueError for another name.

    >>> def loss(query):
    ...     return lg.operators.attend(query, query, query).sum()
    >>> query = jnp.ones((1, 4, 2, 8))
    >>> hessian = jax.eval_shape(jax.hessian(loss), query)
    >>> with lg.implementation("fused"):
    ...     gradient = jax.eval_shape(jax.grad(loss), query)
    >>> gradient.shape
    (1, 4, 2, 8)
    """
    if name not in get_args(Implementation):
        raise ValueError(
            f'implementation("{name}"): allowed are {get_args(Implementation)}; "reference" has '
            'all of JAX\'s transformations, "fused" is faster in training'
        )
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def chosen_implementation(default: Implementation = "reference") -> Implementation:
    """Returns the name given to the innermost `implementation`, or `default` outside of one."""
    return _implementation.get() or default


def is_fused() -> bool:
    """Returns whether operators use their fused kernels, see `implementation`."""
    return chosen_implementation() == "fused"


def stack_options() -> StackOptions:
    """Returns how the step that is being traced computes consecutive blocks."""
    return _stack_options.get() or StackOptions()


def constrain(x: Array) -> Array:
    """Constrains the sharding of an activation ``[b, ...]`` at the edge of a block.

    The identity, unless parameters are sharded: then activations are sharded by the batch alone.
    Without it XLA may follow the parameters instead and sum whole batches over devices (8 TB per
    chip and step in a model of 2.4 B parameters, 33 GB with it).
    """
    return _edge.get()(x)


def replicate(x: Array, free: int) -> Array:
    """Constrains an array to be whole on every device, except along axis `free`.

    The identity outside of a step of several devices. For arrays without a batch, which would
    otherwise follow sharded parameters.
    """
    return _whole.get()(x, free)


def constrain_like_state(tree: PyTree) -> PyTree:
    """Constrains a gradient, or new running statistics, to the shardings that their state has.

    The identity, unless parameters are split over "model". Without it XLA computed the optimizer of
    whole parameters (norms, the classifier) in parts, and gathered the parameters, both moments and
    the average instead of one gradient.
    """
    return _state.get()(tree)


def per_platform(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Computes ``forms[platform](*args)``, or ``default(*args)`` on a platform without a form.

    `jax.lax.platform_dependent`, which traces and differentiates all forms. In a step whose
    platform is known only that platform's form is traced: half of the time of tracing CoAtNet.
    """
    platform = _platform.get()
    if platform is None:
        return jax.lax.platform_dependent(*args, default=default, **forms)
    return forms.get(platform, default)(*args)


def norm_axis() -> str | None:
    """Returns the pmap axis of batch statistics; None under jit, where they are global."""
    return _norm_axis.get()


def mean_over_devices(tree: PyTree) -> PyTree:
    """Averages over devices under pmap; the identity under jit, where arrays are global."""
    return jax.lax.pmean(tree, _axis.get()) if _axis.get() else tree


def sum_over_devices(tree: PyTree) -> PyTree:
    """Sums over devices under pmap; the identity under jit, where arrays are global."""
    return jax.lax.psum(tree, _axis.get()) if _axis.get() else tree


def device_key(key: Array) -> Array:
    """Folds the device's index into a random key under pmap; the identity under jit."""
    return jax.random.fold_in(key, jax.lax.axis_index(_axis.get())) if _axis.get() else key


@contextlib.contextmanager
def tracing(
    *,
    edge: Callable[[Array], Array] = lambda x: x,
    whole: Callable[[Array, int], Array] = lambda x, _: x,
    state: Callable[[PyTree], PyTree] = lambda x: x,
    axis: str | None = None,
    norm_axis: str | None = None,
    options: StackOptions | None = None,
    platform: str | None = None,
) -> Iterator[None]:
    """Context manager that sets what the functions above return while a step is traced."""
    chosen: list[tuple[ContextVar[Any], Any]]
    chosen = [
        (_edge, edge), (_whole, whole), (_state, state), (_axis, axis), (_norm_axis, norm_axis),
        (_stack_options, options), (_platform, platform),
    ]  # fmt: skip
    tokens = [(variable, variable.set(value)) for variable, value in chosen]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)
