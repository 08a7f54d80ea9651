# SPDX-License-Identifier: Apache-2.0
"""Beam search. Legend: b batch, k hypotheses of a sentence, r = b k rows, l length."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

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

MOST = 1024  # hypotheses of a sentence


class _Options(NamedTuple):
    beam: int
    max_length: int
    min_length: int
    early_stop: bool


class _Search(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, "b k"]
    total: Float[Array, "b k"]
    cache: PyTree[Shaped[Array, "r ..."]]
    alive: Hypotheses  # hypotheses without an end token; their scores and lengths are not used
    ended: Hypotheses  # in the order in which they ended
    found: Int[Array, " b"]  # how many have ended
    done: Bool[Array, " b"]


def beam_search(
    module: Decodable,
    variables: PyTree[Array],
    source: Int[Any, "b ls"],
    *,
    beam: int,
    length_penalty: float = 1.0,
    max_length: int,
    min_length: int = 1,
    early_stop: bool = True,
) -> Hypotheses:
    """Searches the `beam` best hypotheses of every sentence, as fairseq's generator does.

    A step extends the alive hypotheses by the 2 `beam` best tokens. An end token counts only among
    the `beam` best of these; the others go on. A sentence is done when `beam` hypotheses have ended
    (``early_stop=False``: when moreover no alive one, its total so far over ``max_length **
    length_penalty``, is better than the worst of them: fairseq's estimate, one token short of the
    bound). After `max_length` tokens the end token is forced, so a hypothesis has at most
    ``max_length + 1``.

    Args:
      source: token ids, padded with the model's padding token.
      length_penalty: exponent of the length, the end token included, that divides the score.
      min_length: tokens before the first possible end token.

    Raises:
      ValueError: beam or lengths that are not positive or do not fit.

    >>> module = lg.create_model(
    ...     "muse", layout="SS", depths=(1, 1), widths=(16, 16), heads=(2, 2), hidden=(16, 16)
    ... )
    >>> source = np.ones((2, 6), np.int32)  # token ids
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), source, source)
    >>> def search(variables):
    ...     return lg.decoding.beam_search(module, variables, source, beam=4, max_length=8)
    >>> jax.eval_shape(search, variables).scores.shape
    (2, 4)
    """
    check(beam, min_length, max_length)
    if beam > MOST:
        raise ValueError(f"beam={beam}: give a number from 1 to {MOST}")
    check_number("length_penalty", length_penalty)
    return _beam_search(
        module,
        variables,
        check_source(source),
        jnp.float32(length_penalty),
        _Options(beam, max_length, min_length, early_stop),
    )


@compiled
def _beam_search(
    module: Decodable,
    variables: PyTree[Array],
    source: Int[Array, "b ls"],
    penalty: Float[Array, ""],
    options: _Options,
) -> Hypotheses:
    beam, max_length, min_length, early_stop = options
    b, length = source.shape[0], max_length + 1
    memory, cache = module.apply(variables, source, length, method="init_cache")
    variables = prepared(module, variables)
    # all hypotheses of a sentence begin alike: at the first step, only the first one counts
    first = jnp.where(jnp.arange(beam) == 0, 0.0, LOWEST)
    search = _Search(
        step=jnp.int32(0),
        token=jnp.full((b, beam), module.start, jnp.int32),
        total=jnp.broadcast_to(first[None], (b, beam)),
        cache=jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), cache),
        alive=nothing(b, beam, length, module.pad),
        ended=nothing(b, beam, length, module.pad),
        found=jnp.zeros(b, jnp.int32),
        done=jnp.zeros(b, bool),
    )

    def advance(search: _Search) -> _Search:
        step = search.step
        logits, cache = module.apply(
            variables, search.token.reshape(-1), memory, search.cache, method="step"
        )
        log_p = log_probabilities(logits, step, module, min_length, max_length)
        log_p = log_p.reshape(b, beam, -1)
        vocabulary = log_p.shape[-1]
        totals = (search.total[..., None] + log_p).reshape(b, -1)
        total, index = lax.top_k(totals, min(2 * beam, beam * vocabulary))
        parent, token = index // vocabulary, index % vocabulary
        score = pick(log_p.reshape(b, -1), index)
        candidates = Hypotheses(
            pick(search.alive.tokens, parent).at[:, :, step].set(token),
            total / (step + 1).astype(jnp.float32) ** penalty,
            jnp.full(token.shape, step + 1),
            pick(search.alive.token_scores, parent).at[:, :, step].set(score),
        )
        ends = (token == module.end) & (total > LOWEST)
        counts = ends & (jnp.arange(token.shape[1])[None] < beam) & ~search.done[:, None]
        ended = _add(search.ended, search.found, candidates, counts, best=not early_stop)
        found = jnp.minimum(search.found + counts.sum(1, dtype=jnp.int32), beam)

        # stable: the alive in their order, then the ended ones, which continue with a score of -inf
        order = jnp.argsort(ends, axis=1, stable=True)[:, :beam]
        total = jnp.where(pick(ends, order), LOWEST, pick(total, order))
        parent = pick(parent, order)
        full = found == beam
        if not early_stop:
            full &= ended.scores.min(1) >= total.max(1) / jnp.float32(max_length) ** penalty
        done = search.done | full | (total.max(1) == LOWEST)
        return _Search(
            step + 1,
            pick(token, order),
            total,
            # the only hypothesis keeps its row; XLA would copy the cache without this case
            cache if beam == 1 else jax.tree.map(lambda x: _reordered(x, parent), cache),
            jax.tree.map(lambda x: pick(x, order), candidates),
            ended,
            found,
            done,
        )

    search = lax.while_loop(lambda s: (s.step <= max_length) & ~s.done.all(), advance, search)
    best = jnp.argsort(-search.ended.scores, axis=1, stable=True)
    return jax.tree.map(lambda x: pick(x, best), search.ended)


def _reordered(x: Shaped[Array, "r ..."], parent: Int[Array, "b k"]) -> Shaped[Array, "r ..."]:
    """Returns the rows of the hypotheses that go on, of each sentence for itself.

    Rows numbered over the whole batch would be gathered from all devices for every token.
    """
    own = x.reshape(*parent.shape, *x.shape[1:])
    return jax.vmap(lambda rows, index: rows[index])(own, parent).reshape(x.shape)


def _add(
    ended: Hypotheses,
    found: Int[Array, " b"],
    candidates: Hypotheses,
    counts: Bool[Array, "b n"],
    *,
    best: bool,
) -> Hypotheses:
    """Appends the candidates that count to the ended hypotheses, up to `beam` of them.

    `best`: the best ones stay; otherwise the first ones.
    """
    beam = ended.scores.shape[1]
    there = jnp.concatenate([jnp.arange(beam)[None] < found[:, None], counts], 1)
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), ended, candidates)
    rank = jnp.where(there, -both.scores, jnp.inf) if best else ~there
    order = jnp.argsort(rank, axis=1, stable=True)[:, :beam]
    there = pick(there, order)
    scores = jnp.where(there, pick(both.scores, order), LOWEST)
    lengths = jnp.where(there, pick(both.lengths, order), 0)
    # missing entries keep the content of an empty slot: these are the last ones of `ended`
    return Hypotheses(
        jnp.where(there[..., None], pick(both.tokens, order), ended.tokens),
        scores,
        lengths,
        jnp.where(there[..., None], pick(both.token_scores, order), ended.token_scores),
    )
