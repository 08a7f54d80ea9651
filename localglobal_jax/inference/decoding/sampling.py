# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and sampling: every hypothesis grows independently of the others.

Legend: b batch, k hypotheses of a sentence, r = b k rows, l length, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from localglobal_jax.inference.decoding.hypotheses import (
    LOWEST,
    Decodable,
    Hypotheses,
    check,
    check_number,
    check_source,
    compiled,
    log_probabilities,
    nothing,
    pick,
    prepared,
)


class _Options(NamedTuple):
    samples: int
    max_length: int
    min_length: int
    draw: bool = False
    top_k: int = 0
    nucleus: bool = False


class _Drawing(NamedTuple):
    key: Key[Array, ""]
    numbers: Int[Array, " b"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    penalty: Float[Array, ""]


def greedy(
    module: Decodable,
    variables: PyTree[Array],
    source: Int[Any, "b ls"],
    *,
    max_length: int,
    min_length: int = 1,
) -> Hypotheses:
    """Takes the likeliest token at every step, until the end token: one hypothesis per sentence.

    >>> module = lg.create_model(
    ...     "muse", layout="SS", depths=(1, 1), widths=(16, 16), heads=(2, 2), hidden=(16, 16)
    ... )
    >>> source = np.ones((2, 6), np.int32)  # token ids
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), source, source)
    >>> def search(variables):
    ...     return lg.decoding.greedy(module, variables, source, max_length=8)
    >>> jax.eval_shape(search, variables).tokens.shape
    (2, 1, 9)
    """
    check(1, min_length, max_length)
    source = check_source(source)
    numbers = jnp.arange(source.shape[0], dtype=jnp.int32)
    drawing = _Drawing(jax.random.key(0), numbers, *(jnp.float32(1) for _ in range(3)))
    options = _Options(1, max_length, min_length)
    return _sample(module, variables, source, drawing, options)


def sample(
    module: Decodable,
    variables: PyTree[Array],
    source: Int[Any, "b ls"],
    key: Key[Array, ""],
    *,
    numbers: Int[Any, " b"] | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length_penalty: float = 1.0,
    max_length: int,
    min_length: int = 1,
) -> Hypotheses:
    """Draws hypotheses token by token; `token_scores` are the model's log probabilities.

    Args:
      key: the draws of a sentence are a function of the key, of the sentence's number and of
        `samples`.
      numbers: the numbers of the sentences; None: their rows.
      samples: hypotheses per sentence.
      temperature: divides the logits before drawing. For 0, use `greedy`.
      top_k: draws among the k likeliest tokens; 0: all.
      top_p: draws among the likeliest tokens that together reach this probability
        (arXiv 1904.09751).

    Raises:
      ValueError: an argument out of range.

    >>> module = lg.create_model(
    ...     "muse", layout="SS", depths=(1, 1), widths=(16, 16), heads=(2, 2), hidden=(16, 16)
    ... )
    >>> source = np.ones((2, 6), np.int32)  # token ids
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), source, source)
    >>> def draw(variables):
    ...     key = jax.random.key(0)
    ...     return lg.decoding.sample(
    ...         module, variables, source, key, samples=3, top_p=0.9, max_length=8
    ...     )
    >>> jax.eval_shape(draw, variables).tokens.shape
    (2, 3, 9)
    """
    check(samples, min_length, max_length)
    check_number("length_penalty", length_penalty)
    check_number("for temperature=0 use greedy; temperature", temperature, positive=True)
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"top_k={top_k}, top_p={top_p}: give top_k >= 0 and 0 < top_p <= 1")
    numbers = np.arange(len(source)) if numbers is None else numbers
    if np.shape(numbers) != (len(source),):
        raise ValueError(f"numbers of shape {np.shape(numbers)}: give one for each sentence")
    scalars = (jnp.float32(x) for x in (temperature, top_p, length_penalty))
    options = _Options(samples, max_length, min_length, True, top_k, top_p < 1)
    source = check_source(source)
    drawing = _Drawing(key, jnp.asarray(numbers, jnp.int32), *scalars)
    return _sample(module, variables, source, drawing, options)


class _Sampling(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, " r"]
    cache: PyTree[Shaped[Array, "r ..."]]
    grown: Hypotheses  # k = 1, rows r; lengths are 0 until the end
    done: Bool[Array, " r"]


@compiled
def _sample(
    module: Decodable,
    variables: PyTree[Array],
    source: Int[Array, "b ls"],
    drawing: _Drawing,
    options: _Options,
) -> Hypotheses:
    samples, max_length, min_length, *_ = options
    b, length = source.shape[0], max_length + 1
    memory, cache = module.apply(variables, source, length, method="init_cache")
    variables = prepared(module, variables)
    rows = b * samples
    numbers = drawing.numbers[:, None] * samples + jnp.arange(samples)[None]
    keys = jax.vmap(lambda i: jax.random.fold_in(drawing.key, i))(numbers.reshape(-1))
    start = _Sampling(
        step=jnp.int32(0),
        token=jnp.full(rows, module.start, jnp.int32),
        cache=jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), cache),
        grown=nothing(rows, 1, length, module.pad),
        done=jnp.zeros(rows, bool),
    )

    def advance(state: _Sampling) -> _Sampling:
        step, grown = state.step, state.grown
        logits, cache = module.apply(variables, state.token, memory, state.cache, method="step")
        log_p = log_probabilities(logits, step, module, min_length, max_length)
        token = log_p.argmax(-1)
        if options.draw:
            allowed = _cut(log_p / drawing.temperature, drawing.top_p, options)
            here = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            token = jax.vmap(jax.random.categorical)(here, allowed)
        token = jnp.where(state.done, module.pad, token).astype(jnp.int32)
        score = jnp.where(state.done, 0.0, pick(log_p, token[:, None])[:, 0])
        ends = (token == module.end) & ~state.done
        grown = grown._replace(
            tokens=grown.tokens.at[:, 0, step].set(token),
            token_scores=grown.token_scores.at[:, 0, step].set(score),
            lengths=jnp.where(ends[:, None], step + 1, grown.lengths),
        )
        return _Sampling(step + 1, token, cache, grown, state.done | ends)

    state = lax.while_loop(lambda s: (s.step <= max_length) & ~s.done.all(), advance, start)
    total = state.grown.token_scores.sum(-1)
    scores = total / state.grown.lengths.astype(jnp.float32) ** drawing.penalty
    grown = state.grown._replace(scores=scores)
    grown = jax.tree.map(lambda x: x.reshape(b, samples, *x.shape[2:]), grown)
    order = jnp.argsort(-grown.scores, axis=1, stable=True)
    return jax.tree.map(lambda x: pick(x, order), grown)


def _cut(
    logits: Float[Array, "r v"], top_p: Float[Array, ""], options: _Options
) -> Float[Array, "r v"]:
    """Sets tokens outside the `top_k`, and outside the nucleus of mass `top_p`, to -inf."""
    if options.top_k:
        least = lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, LOWEST, logits)
    if options.nucleus:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(descending), -1)
        # the token that crosses top_p is the last one inside
        inside = (mass < top_p).sum(-1, keepdims=True)
        least = pick(descending, jnp.minimum(inside, logits.shape[-1] - 1))
        logits = jnp.where(logits < least, LOWEST, logits)
    return logits
