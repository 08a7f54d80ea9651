# SPDX-License-Identifier: Apache-2.0
"""What a step says to the code inside it while it is traced: models know nothing of devices.

Nothing is set outside of a step of `placement.Partitioner`: every function here is the identity
then, or says "no" (`formulation` says "tuned").
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, PyTree

Formulation = Literal["tuned", "plain"]


class StackOptions(NamedTuple):
    """How blocks in sequence are computed, see `in_sequence.py`."""

    remat: bool = False
    scan: bool = False
    # Makes the split parameters of a block whole when it is computed, and again in its backward
    # pass. Left to itself XLA gathered activations instead.
    gather: Callable[[PyTree], PyTree] | None = None


_edge: ContextVar[Callable[[Array], Array]] = ContextVar("edge", default=lambda x: x)
_axis: ContextVar[str | None] = ContextVar("axis", default=None)
_norm_axis: ContextVar[str | None] = ContextVar("norm_axis", default=None)
_stack_options: ContextVar[StackOptions | None] = ContextVar("forms", default=None)
_formulation: ContextVar[Formulation] = ContextVar("formulation", default="tuned")


def stack_options() -> StackOptions:
    """How the step that is being traced wants its blocks."""
    return _stack_options.get() or StackOptions()


def constrain(x: Array) -> Array:
    """What every activation ``[b, ...]`` at the edge of a block passes through.

    The identity, unless parameters are split: then it says that activations are split by the batch
    alone. Without it XLA may follow the parameters instead and sum whole batches over devices (8 TB
    per chip and step were seen in a model of 2.4 B parameters, 33 GB with it).
    """
    return _edge.get()(x)


def formulation() -> Formulation:
    """Which of two ways to the same numbers: "plain" is what linen and autodiff make of the
    equations, "tuned" what moves fewer bytes. Outside of a step: tuned.
    """
    return _formulation.get()


def norm_axis() -> str | None:
    """The axis over which batch statistics are taken, under pmap; under jit they are global."""
    return _norm_axis.get()


def mean_over_devices(tree: PyTree) -> PyTree:
    """The mean of what each device has, under pmap."""
    return jax.lax.pmean(tree, _axis.get()) if _axis.get() else tree


def sum_over_devices(tree: PyTree) -> PyTree:
    """The sum of what each device has, under pmap; under jit arrays are whole already."""
    return jax.lax.psum(tree, _axis.get()) if _axis.get() else tree


def own_key(key: Array) -> Array:
    """Another random key on every device, under pmap; under jit there is one of each number."""
    return jax.random.fold_in(key, jax.lax.axis_index(_axis.get())) if _axis.get() else key


@contextlib.contextmanager
def tracing(
    *,
    edge: Callable[[Array], Array] = lambda x: x,
    axis: str | None = None,
    norm_axis: str | None = None,
    forms: StackOptions | None = None,
    formulation: Formulation = "tuned",
) -> Iterator[None]:
    """Sets what the functions above do, while a function is traced."""
    chosen: list[tuple[ContextVar[Any], Any]]
    chosen = [(_edge, edge), (_axis, axis), (_norm_axis, norm_axis), (_stack_options, forms)]
    chosen.append((_formulation, formulation))
    tokens = [(variable, variable.set(value)) for variable, value in chosen]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)
