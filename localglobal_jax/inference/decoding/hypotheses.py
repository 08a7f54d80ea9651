# SPDX-License-Identifier: Apache-2.0
"""The interface of modules that can be decoded, and the result of decoding.

Legend: b batch, k hypotheses of a sentence, r = b k rows, l length, v vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from localglobal_jax.parallel import context

LOWEST = -jnp.inf


class Hypotheses(NamedTuple):
    """Decoded sentences, best first. `tokens` exclude the start and include the end token.

    Padding follows the end token. `scores` are the sum of `token_scores` over ``length **
    length_penalty``. An empty slot has the score -inf and the length 0.

    >>> found = lg.decoding.Hypotheses(
    ...     tokens=jnp.array([[[5, 6, 2, 1]]]),
    ...     scores=jnp.array([[-0.3]]),
    ...     lengths=jnp.array([[3]]),
    ...     token_scores=jnp.zeros((1, 1, 4)),
    ... )
    >>> best = found.tokens[0, 0, : found.lengths[0, 0] - 1]  # without the end token
    >>> best.tolist()
    [5, 6]
    """

    tokens: Int[Array, "b k l"]
    scores: Float[Array, "b k"]
    lengths: Int[Array, "b k"]
    token_scores: Float[Array, "b k l"]


@runtime_checkable
class Decodable(Protocol):
    """A flax module that can be decoded. It has three token ids and two methods:

        init_cache(source [b, ls], length) -> (memory, cache)   rows of both: b
        step(token [r], memory, cache) -> (logits [r, v], cache)   rows r: b times hypotheses

    The memory is constant. Axis 0 of every leaf of the cache is the row. A third method is
    optional: ``narrowed(variables)`` returns the variables for `step`, prepared once. A module
    with ``log_probabilities = True`` returns these in place of logits.

    >>> isinstance(lg.create_model("muse"), lg.decoding.Decodable)
    True
    >>> isinstance(lg.create_model("coatnet"), lg.decoding.Decodable)
    False
    """

    @property
    def pad(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


def prepared(module: Decodable, variables: Any) -> Any:
    """Returns the variables that the steps of a search read."""
    return module.narrowed(variables) if hasattr(module, "narrowed") else variables


def log_probabilities(
    logits: Float[Array, "r v"],
    step: Int[Array, ""],
    module: Decodable,
    min_length: int,
    max_length: int,
) -> Float[Array, "r v"]:
    """Computes the log softmax (of logits), with -inf for tokens that are not allowed at `step`.

    Padding is never allowed, the end token not before `min_length`, and no other from `max_length`.
    """
    log_p = logits.astype(jnp.float32)
    if not getattr(module, "log_probabilities", False):
        log_p = jax.nn.log_softmax(log_p)
    token = jnp.arange(log_p.shape[-1])[None]
    forbidden = token == module.pad
    forbidden |= (token == module.end) & (step < min_length)
    forbidden |= (token != module.end) & (step >= max_length)
    return jnp.where(forbidden, LOWEST, log_p)


def nothing(rows: int, hypotheses: int, length: int, pad: int) -> Hypotheses:
    """Returns empty slots."""
    shape = (rows, hypotheses)
    return Hypotheses(
        jnp.full((*shape, length), pad, jnp.int32),
        jnp.full(shape, LOWEST),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros((*shape, length)),
    )


def pick(x: Shaped[Array, "b n ..."], index: Int[Array, "b k"]) -> Shaped[Array, "b k ..."]:
    """Returns ``x[i, index[i]]`` for every row i."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def compiled(search: Callable[..., Hypotheses]) -> Callable[..., Hypotheses]:
    """Returns ``search(module, variables, source, numbers, options)`` compiled by `jax.jit`.

    `module` and `options` are static, and so is the implementation of the operators: the one that
    the caller selected, else "fused".
    """

    def traced(name: context.Implementation, *args: Any) -> Hypotheses:
        with context.implementation(name):
            return search(*args)

    jitted = jax.jit(traced, static_argnums=(0, 1, 5))
    return lambda *args: jitted(context.chosen_implementation("fused"), *args)


def max_length(source_length: int) -> int:
    """Returns the default limit of tokens for a source of (padded) length `source_length`.

    The limit is 1.5 times the source, plus ten; few real translations are longer. A larger limit
    costs memory; it costs time only if no end token comes before it.

    >>> lg.decoding.max_length(20)
    40
    """
    return source_length + source_length // 2 + 10


def check_source(source: Any) -> Int[Array, "b ls"]:
    """Returns `source` as int32 [sentences, length]; raises ValueError for other arrays."""
    source = jnp.asarray(source)
    if source.ndim != 2 or not source.size or not jnp.issubdtype(source.dtype, jnp.integer):
        raise ValueError(
            f"source: {source.dtype} of shape {source.shape}; give integers [sentences, length]"
        )
    return source.astype(jnp.int32)


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Raises ValueError unless `value` is finite and >= 0, or > 0 with `positive`."""
    if not math.isfinite(value) or value < 0 or (positive and value < np.finfo(np.float32).tiny):
        raise ValueError(f"{name}={value}: give a finite number {'> 0' if positive else '>= 0'}")


def check(hypotheses: int, min_length: int, max_length: int) -> None:
    """Raises ValueError for numbers of hypotheses or tokens out of range."""
    if hypotheses < 1 or not 0 <= min_length <= max_length or max_length < 1:
        raise ValueError(
            f"hypotheses={hypotheses}, min_length={min_length}, max_length={max_length}: "
            "give hypotheses >= 1, max_length >= 1 and 0 <= min_length <= max_length"
        )
