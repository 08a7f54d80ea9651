# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-adds of a module, counted from one abstract trace.

Nothing is allocated, so a model of billions of parameters takes seconds. A multiply-add is one
multiplication and its addition inside a matrix product or a convolution, the unit that the vision
papers call a FLOP; everything elementwise (norms, activations, pooling, bias) counts as nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from localglobal_jax.blocks import BLOCKS, SEQUENCE_BLOCKS
from localglobal_jax.blocks.stack import MAY_DIFFER
from localglobal_jax.parallel import context

_KINDS = {*BLOCKS.values(), *SEQUENCE_BLOCKS.values()}


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """`shapes`: the variables of the module, as `jax.ShapeDtypeStruct`s."""

    parameters: int
    multiply_adds: int
    shapes: Any


def model_cost(module: nn.Module, *inputs: Any, traced: dict[Any, Any] | None = None) -> ModelCost:
    """Traces ``module.init`` on `inputs` (arrays or `jax.ShapeDtypeStruct`s).

    The multiply-adds are those of the whole batch in `inputs`: give a batch of one. Equal blocks
    are traced once; with one dict as `traced` for several models, once in all of them.
    """
    blocks = _Blocks({} if traced is None else traced)

    def init(*args: Any) -> Any:
        with nn.intercept_methods(blocks):
            return module.init(jax.random.key(0), *args, train=False)

    with context.implementation("reference"):
        jaxpr, shapes = jax.make_jaxpr(init, return_shape=True)(*inputs)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    return ModelCost(parameters, _count(jaxpr.jaxpr) + blocks.multiply_adds, shapes)


class _Blocks:
    """Interceptor of `flax.linen` that gives blocks zeros for variables and outputs.

    The first of equal blocks is traced by itself, for its shapes and its multiply-adds.
    """

    def __init__(self, traced: dict[Any, tuple[int, Any]]) -> None:
        self.multiply_adds = 0
        self._traced = traced
        self._is_tracing = False
        self._zeros: dict[Any, Any] = {}  # by shape and dtype

    def __call__(self, call: Any, args: Any, kwargs: Any, about: nn.module.InterceptorContext):
        block = about.module
        if self._is_tracing or about.method_name != "__call__" or type(block) not in _KINDS:
            return call(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        shapes = [jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        names = {field.name for field in dataclasses.fields(block)} - {*MAY_DIFFER}
        fields = {name: getattr(block, name) for name in sorted(names)}
        key = type(block), repr(fields), str(shapes), tree
        if key not in self._traced:
            self._traced[key] = self._trace(block.clone(parent=None, name=None), shapes, tree)
        multiply_adds, (outputs, variables) = self._traced[key]
        self.multiply_adds += multiply_adds
        for collection, leaves in variables.items():
            self._put(block.scope, collection, leaves)
        return jax.tree.map(self._zeros_like, outputs)

    def _trace(self, block: nn.Module, leaves: list[Any], tree: Any) -> tuple[int, Any]:
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.AbstractValue)]

        def init(*arrays: Any) -> Any:
            given = dict(zip(places, arrays, strict=True))
            args, kwargs = tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
            return block.init_with_output(jax.random.key(0), *args, **kwargs)

        self._is_tracing = True
        try:
            structs = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in places]
            jaxpr, shapes = jax.make_jaxpr(init, return_shape=True)(*structs)
        finally:
            self._is_tracing = False
        return _count(jaxpr.jaxpr), shapes

    def _put(self, scope: Any, collection: str, tree: Any) -> None:
        """Writes zeros of the shapes of `tree` into a scope and its children."""
        for name, leaf in tree.items():
            if isinstance(leaf, jax.ShapeDtypeStruct):
                scope.put_variable(collection, name, self._zeros_like(leaf))
            else:
                self._put(scope.push(name, reuse=True), collection, leaf)

    def _zeros_like(self, leaf: Any) -> Any:
        key = leaf.shape, leaf.dtype
        if key not in self._zeros:
            self._zeros[key] = jnp.zeros(*key)
        return self._zeros[key]


def multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Counts the multiply-adds of one call of a function of arrays (or of `jax.ShapeDtypeStruct`s).

    Work that the fused implementation or `remat` repeats counts once: the result is the work of
    the model, for MFU.
    """
    with context.implementation("reference"):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def computed(jaxpr: ClosedJaxpr, *, loops: int | None = None) -> int:
    """Counts the multiply-adds of a program as traced, repeated work included.

    `loops`: assumed trip count of a while loop, which a jaxpr does not contain.
    """
    return _count(jaxpr.jaxpr, loops)


def _count(jaxpr: Jaxpr, loops: int | None = None) -> int:
    return sum(_count_equation(equation, loops) for equation in jaxpr.eqns)


def _count_equation(equation: Any, loops: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        return of_product(equation)
    counts = [_count(inner, loops) for inner in _inner(params)]
    if name == "scan":
        return params["length"] * sum(counts)
    if name == "cond":
        # `lax.platform_dependent`: one function in several forms. The last is the default one,
        # which computes the equations; others are sums of shifts, or products with zeros.
        return counts[-1]
    if name == "while" and sum(counts):
        if loops is not None:
            return loops * sum(counts)
        raise ValueError(
            "a while loop has no trip count in the program: give `computed` loops=COUNT"
        )
    return sum(counts)


def of_product(equation: Any) -> int:
    """Counts the multiply-adds of an equation that is a ``dot_general`` or a convolution."""
    params, result = equation.params, equation.outvars[0].aval.size
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return int(result * np.prod([left[i] for i in contracting], initial=1))
    kernel = equation.invars[1].aval
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return int(result * (kernel.size // features))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
