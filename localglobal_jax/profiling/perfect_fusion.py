# SPDX-License-Identifier: Apache-2.0
"""The least work and traffic of a step, whatever the compiler fuses. Pure.

A train step computes each matrix product and convolution once, and its two gradients once. It reads
and writes each parameter and each array of the optimizer once, and reads the batch once. What its
backward pass needs of the forward pass is written once and read once.

The last part is a minimum cut (Ford and Fulkerson, 1956) of the forward pass. Nodes are its arrays,
with their bytes as capacity. Sources are the results of products with a parameter, which would have
to be computed twice; everything else (norms, activations, dropout, softmax, attention weights, as
flash attention does, arXiv 2205.14135) can be computed again from its inputs. Sinks are the arrays
that a derivative uses. The cut is the least that must be kept for the backward pass.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow

from localglobal_jax.models import flops
from localglobal_jax.parallel import context
from localglobal_jax.training import freezing
from localglobal_jax.training.tasks import Task

Role = Literal["parameter", "example", "other"]  # of an input: other: random keys, running means
PRODUCTS = ("dot_general", "conv_general_dilated")
# The derivative uses the result; it uses the operand of any other nonlinear function.
BY_RESULT = ("exp", "exp2", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "cbrt")
BY_OPERAND = (
    *("log", "log1p", "erf", "erfc", "erf_inv", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "pow", "integer_pow", "square"),
    *("lgamma", "digamma", "cumprod", "cumlogsumexp", "reduce_prod"),
)
BY_SIGN = ("max", "min", "clamp", "abs")  # one bit for each element of the result
BY_INDEX = ("select_n", "gather", "dynamic_slice", "dynamic_update_slice", "scatter-add", "scatter")
OPAQUE = ("while",)
ONE_TO_ONE = ("optimization_barrier",)


@dataclasses.dataclass(frozen=True)
class Least:
    """The least work of a step on all devices together.

    `kept`: bytes of the forward pass that the backward pass needs.
    """

    multiply_adds: int
    kept: int


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array. `node`: its number if it depends on a product with a parameter, else None."""

    node: int | None
    differentiated: bool  # its gradient is needed for that of a parameter
    per_example: bool


CONSTANT = _Value(None, False, False)


def of_gradient(jaxpr: ClosedJaxpr, roles: Sequence[Role]) -> Least:
    """Returns the least work of a function and of its gradient for its parameters.

    Args:
      jaxpr: the function, forward only, traced with the reference implementation.
      roles: one for each input.
    """
    graph = _Graph()
    graph.run(jaxpr, [_Value(None, role == "parameter", role == "example") for role in roles])
    return Least(graph.multiply_adds, graph.least_cut())


def of_training(
    task: Task,
    variables: Mapping[str, Any],
    batch: Mapping[str, Any],
    freeze: tuple[str, ...] = (),
) -> Least:
    """Returns the least work of the gradient of a task's loss on a global batch, from shapes.

    Parameters that `freeze` names have no gradient.
    """

    def loss(trained: Any, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        params = freezing.merged(trained, variables["params"])
        return task.loss({**variables, "params": params}, batch, key).total

    trained = freezing.trained(variables["params"], freeze)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    args = (trained, dict(variables), dict(batch), key)
    return _traced(loss, args, ("parameter", "other", "example", "other"))


def of_evaluation(
    function: Callable[..., Any], variables: Mapping[str, Any], batch: Mapping[str, Any]
) -> Least:
    """Returns the least work of a function of variables and a global batch, without gradients."""
    return _traced(function, (dict(variables), dict(batch)), ("other", "example"))


def _traced(function: Callable[..., Any], args: Sequence[Any], parts: Sequence[Role]) -> Least:
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in args]
    with context.implementation("reference"):
        jaxpr = jax.make_jaxpr(function)(*shapes)
    roles = [role for role, x in zip(parts, shapes, strict=True) for _ in jax.tree.leaves(x)]
    return of_gradient(jaxpr, roles)


class _Graph:
    """The arrays of a forward pass; every function in it is inlined, every loop unrolled."""

    def __init__(self) -> None:
        self.bits: list[int] = []
        self.edges: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.needed: set[int] = set()
        self.multiply_adds = 0

    def run(self, jaxpr: ClosedJaxpr | Jaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """Adds a function and returns its results."""
        inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        values = dict.fromkeys(inner.constvars, CONSTANT)
        values |= dict(zip(inner.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return CONSTANT if isinstance(atom, Constant) else values[atom]

        for equation in inner.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def _equation(self, equation: Any, given: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, given)
        if name == "cond":  # the last branch, as `flops` counts it
            return self.run(params["branches"][-1], given[1:])
        if name in OPAQUE:
            return [self._source(v.aval, given) for v in equation.outvars]
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in params:
                return self.run(params[key], given)
        if name in PRODUCTS:
            return [self._product(equation, given)]
        if name in ONE_TO_ONE:
            return given
        found = [self._array(v.aval, given) for v in equation.outvars]
        self._derivative(equation, given, found)
        return found

    def _array(self, aval: Any, given: Sequence[_Value]) -> _Value:
        """Adds an array that can be computed again from `given`."""
        inexact = np.issubdtype(_dtype(aval), np.inexact) or _dtype(aval).name == "bfloat16"
        differentiated = inexact and any(v.differentiated for v in given)
        per_example = any(v.per_example for v in given)
        before = {v.node for v in given if v.node is not None}
        if not before:
            return _Value(None, differentiated, per_example)
        node = self._node(_bits(aval))
        self.edges += [(other, node) for other in before]
        return _Value(node, differentiated, per_example)

    def _source(self, aval: Any, given: Sequence[_Value]) -> _Value:
        """Adds an array that must not be computed again."""
        node = self._node(_bits(aval))
        self.sources.append(node)
        return _Value(node, any(v.differentiated for v in given), any(v.per_example for v in given))

    def _node(self, bits: int) -> int:
        self.bits.append(bits)
        return len(self.bits) - 1

    def _need(self, *values: _Value) -> None:
        self.needed |= {v.node for v in values if v.node is not None}

    def _product(self, equation: Any, given: list[_Value]) -> _Value:
        left, right = given
        once = flops.of_product(equation)
        self.multiply_adds += once * (1 + left.differentiated + right.differentiated)
        if left.differentiated:
            self._need(right)
        if right.differentiated:
            self._need(left)
        aval = equation.outvars[0].aval
        if left.per_example and right.per_example:  # as attention weights: computed again
            return self._array(aval, given)
        with_parameter = any(v.differentiated for v in given) and any(v.per_example for v in given)
        return self._source(aval, given) if with_parameter else self._array(aval, given)

    def _derivative(self, equation: Any, given: list[_Value], found: list[_Value]) -> None:
        """Marks the arrays that the derivative of an elementwise operation or reduction uses."""
        name = equation.primitive.name
        if not any(v.differentiated for v in found):
            return
        if name in ("mul", "div"):
            left, right = given
            if left.differentiated:
                self._need(right)
            if right.differentiated:
                self._need(left, *([right] if name == "div" else []))
        elif name in BY_RESULT:
            self._need(*found)
        elif name in BY_OPERAND:
            self._need(*given)
        elif name in BY_SIGN:
            before = {v.node for v in given if v.node is not None}
            if before:
                sign = self._node(equation.outvars[0].aval.size)
                self.edges += [(other, sign) for other in before]
                self.needed.add(sign)
        elif name in BY_INDEX:
            self._need(*[v for v in given if not v.differentiated])

    def _scan(self, equation: Any, given: list[_Value]) -> list[_Value]:
        params = equation.params
        body, length = params["jaxpr"], params["length"]
        constants, carried = params["num_consts"], params["num_carry"]
        fixed, carry = given[:constants], given[constants : constants + carried]
        stacked: list[list[_Value]] = []
        for _ in range(length):
            slices = [
                self._array(v.aval, [x])
                for v, x in zip(
                    body.jaxpr.invars[constants + carried :],
                    given[constants + carried :],
                    strict=True,
                )
            ]
            out = self.run(body, [*fixed, *carry, *slices])
            carry = out[:carried]
            stacked.append(out[carried:])
        whole = [
            self._array(v.aval, [row[i] for row in stacked])
            for i, v in enumerate(equation.outvars[carried:])
        ]
        return [*carry, *whole]

    def least_cut(self) -> int:
        """Returns the bytes of the smallest set of arrays between sources and needed arrays."""
        if not (self.sources and self.needed):
            return 0
        count = len(self.bits)
        unit = max(1, -(-sum(self.bits) // 2**29))  # SciPy's flows have 32 bits
        start, end, unlimited = 2 * count, 2 * count + 1, 2**30
        rows = np.array(
            [(2 * i, 2 * i + 1, bits // unit) for i, bits in enumerate(self.bits)]
            + [(2 * a + 1, 2 * b, unlimited) for a, b in set(self.edges)]
            + [(start, 2 * i, unlimited) for i in self.sources]
            + [(2 * i + 1, end, unlimited) for i in sorted(self.needed)],
            np.int64,
        )
        shape = (2 * count + 2, 2 * count + 2)
        graph = coo_array((rows[:, 2].astype(np.int32), (rows[:, 0], rows[:, 1])), shape).tocsr()
        return int(maximum_flow(graph, start, end).flow_value) * unit // 8


def _dtype(aval: Any) -> np.dtype:
    """Returns the dtype of an array; random keys count as integers."""
    found = getattr(aval, "dtype", np.dtype(np.int32))
    return found if isinstance(found, np.dtype) else np.dtype(np.int32)


def _bits(aval: Any) -> int:
    dtype = _dtype(aval)
    return int(aval.size) * (1 if dtype == np.bool_ else 8 * dtype.itemsize)
