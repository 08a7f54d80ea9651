# SPDX-License-Identifier: Apache-2.0
"""Decodes a language model that is a table, so that all its sentences can be enumerated."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from localglobal_jax.inference import decoding
from localglobal_jax.inference.decoding import sampling
from localglobal_jax.models.registry import create_model
from localglobal_jax.profiling import collectives, hlo

PAD, END, VOCABULARY, STATES = 1, 2, 5, 4001
MAX = 4


@dataclasses.dataclass(frozen=True)
class Table:
    """The next token depends on the sentence and on all tokens so far."""

    pad: int = PAD
    start: int = END
    end: int = END

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables, *args)

    def init_cache(self, variables, source, length):
        state = jnp.zeros(source.shape[0], jnp.int32)
        return {"sentence": source[:, 0]}, {"state": state, "sentence": source[:, 0]}

    def step(self, variables, token, memory, cache):
        state = follow(cache["state"], token)
        # the cache's own copy: a wrong reordering across sentences would show
        logits = variables[cache["sentence"], state]
        return logits, {**cache, "state": state}


@dataclasses.dataclass(frozen=True)
class Sized(Table):
    target_vocab: int = 0


def follow(state, token):
    return (state * VOCABULARY + token + 1) % STATES  # another state after every prefix


def tables(seed, sentences=2):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(sentences, STATES, VOCABULARY)).astype(np.float32)


def log_p(table, sentence, prefix):
    """Of every next token, after the start token and `prefix`."""
    state = 0
    for token in (END, *prefix):
        state = follow(state, token)
    logits = table[sentence, state].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


@functools.cache
def everything(seed, sentence, min_length=1):
    """Every hypothesis and its log probabilities."""
    table = tables(seed)
    found = []
    for length in range(min_length, MAX + 1):
        for words in itertools.product([0, 3, 4], repeat=length):
            tokens = (*words, END)
            found.append(
                (tokens, [log_p(table, sentence, tokens[:i])[t] for i, t in enumerate(tokens)])
            )
    return found


def python_beam_search(seed, sentence, *, beam, penalty, early_stop, min_length):
    """fairseq's generator, as FACTS has it, with lists."""
    table = tables(seed)
    alive, ended = [((), [])], []
    for step in range(MAX + 1):
        candidates = []
        for words, scores in alive:
            p = log_p(table, sentence, words)
            for token in range(VOCABULARY):
                only_end = step == MAX and token != END
                if token != PAD and not (token == END and step < min_length) and not only_end:
                    candidates.append(((*words, token), [*scores, p[token]]))
        candidates.sort(key=lambda c: -sum(c[1]))
        candidates = candidates[: 2 * beam]
        new = [c for c in candidates[:beam] if c[0][-1] == END]
        score = lambda c: sum(c[1]) / len(c[0]) ** penalty  # noqa: E731
        ended += new
        ended = ended[:beam] if early_stop else sorted(ended, key=score, reverse=True)[:beam]
        alive = [c for c in candidates if c[0][-1] != END][:beam]
        if len(ended) == beam and early_stop:
            break
        if len(ended) == beam and alive:
            possible = max(sum(c[1]) for c in alive) / MAX**penalty
            if min(map(score, ended)) >= possible:
                break
    return sorted(ended, key=score, reverse=True)


def run(seed, *, beam, sentences=(0, 1), **options):
    source = np.array(sentences, np.int32)[:, None]
    options = {"max_length": MAX, **options}
    return decoding.beam_search(Table(), jnp.asarray(tables(seed)), source, beam=beam, **options)


def compare(found, row, expected, penalty):
    assert np.isfinite(found.scores[row]).sum() == len(expected)
    for i, (tokens, scores) in enumerate(expected):
        n = len(tokens)
        assert found.lengths[row, i] == n
        assert found.tokens[row, i, :n].tolist() == list(tokens)
        assert set(found.tokens[row, i, n:].tolist()) <= {PAD}
        np.testing.assert_allclose(found.token_scores[row, i, :n], scores, atol=1e-5)
        assert not found.token_scores[row, i, n:].any()
        np.testing.assert_allclose(found.scores[row, i], sum(scores) / n**penalty, atol=1e-5)


# ---------------------------------------------------------------------------- beam search


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]))
def test_a_beam_as_wide_as_the_language_finds_everything_in_order(seed, penalty):
    everything_there_is = 3 + 9 + 27 + 81
    found = run(seed, beam=everything_there_is, length_penalty=penalty)
    for sentence in (0, 1):
        expected = everything(seed, sentence)
        by_score = sorted(expected, key=lambda e: -sum(e[1]) / len(e[0]) ** penalty)
        compare(found, sentence, by_score, penalty)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    beam=st.sampled_from([1, 2, 4]),
    penalty=st.sampled_from([0.0, 1.0]),
    early_stop=st.booleans(),
    min_length=st.sampled_from([0, 3]),
)
def test_every_beam_is_that_of_the_same_search_with_lists(
    seed, beam, penalty, early_stop, min_length
):
    options = {"early_stop": early_stop, "min_length": min_length}
    found = run(seed, beam=beam, length_penalty=penalty, **options)
    for sentence in (0, 1):
        expected = python_beam_search(seed, sentence, beam=beam, penalty=penalty, **options)
        compare(found, sentence, expected, penalty)


def test_a_sentence_does_not_depend_on_the_others_and_every_run_is_the_same():
    together, again = run(3, beam=3), run(3, beam=3)
    jax.tree.map(np.testing.assert_array_equal, together, again)
    for row in (0, 1):
        alone = run(3, beam=3, sentences=(row,))
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[row], theirs[0])


def test_one_compilation_for_all_batches_of_a_shape(monkeypatch):
    from localglobal_jax.inference.decoding import beam

    traced, log_probabilities = [], beam.log_probabilities

    def counting(*args):
        traced.append(args)
        return log_probabilities(*args)

    monkeypatch.setattr(beam, "log_probabilities", counting)
    jax.clear_caches()
    run(0, beam=2)
    before = len(traced)
    for seed in range(3):
        run(seed, beam=2, length_penalty=0.1 * seed)
    assert len(traced) == before > 0


# ---------------------------------------------------------------------------- greedy, sampling


def draw(seed, key, samples, **options):
    return decoding.sample(
        Table(), jnp.asarray(tables(seed)), jnp.array([[0], [1]]), jax.random.key(key),
        samples=samples, max_length=MAX, **options,
    )  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_greedy_is_a_beam_of_one(seed):
    found = decoding.greedy(
        Table(), jnp.asarray(tables(seed)), jnp.array([[0], [1]]), max_length=MAX
    )
    beam = run(seed, beam=1)
    np.testing.assert_array_equal(found.tokens, beam.tokens)
    np.testing.assert_array_equal(found.lengths, beam.lengths)
    np.testing.assert_allclose(found.scores, beam.scores, atol=1e-5)
    np.testing.assert_allclose(found.token_scores, beam.token_scores, atol=1e-5)


def test_samples_have_the_frequencies_of_the_model():
    seed, samples = 1, 4000
    found = draw(seed, 0, samples, length_penalty=0.0)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    for sentence in (0, 1):
        expected = {tokens: scores for tokens, scores in everything(seed, sentence)}
        first = np.exp(log_p(tables(seed), sentence, ()))
        first[[PAD, END]] = 0  # not as the first token
        first /= first.sum()
        drawn = np.bincount(found.tokens[sentence, :, 0], minlength=VOCABULARY) / samples
        np.testing.assert_allclose(drawn, first, atol=5 * math.sqrt(0.25 / samples))
        for i in range(20):
            n = found.lengths[sentence, i]
            scores = expected[tuple(found.tokens[sentence, i, :n].tolist())]
            np.testing.assert_allclose(found.token_scores[sentence, i, :n], scores, atol=1e-5)
            np.testing.assert_allclose(found.scores[sentence, i], sum(scores), atol=1e-5)


def test_top_k_top_p_and_temperature_narrow_to_greedy():
    best = run(5, beam=1)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        found = draw(5, 0, 3, **options)
        for i in range(3):
            np.testing.assert_array_equal(found.tokens[:, i], best.tokens[:, 0])


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}])
def test_only_what_is_inside_the_cut_is_drawn(options):
    found = draw(2, 0, 500, **options)
    for sentence in (0, 1):
        p = np.exp(log_p(tables(2), sentence, ()))
        p[[PAD, END]] = 0
        order = np.argsort(-p)
        mass = np.cumsum(p[order]) / p.sum()
        inside = options.get("top_k") or int((mass < options["top_p"]).sum()) + 1
        assert set(found.tokens[sentence, :, 0].tolist()) == set(order[:inside].tolist())


def test_a_nucleus_ends_with_the_token_that_reaches_its_mass_exactly():
    logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    mass = jnp.cumsum(jax.nn.softmax(jnp.sort(logits, descending=True)), -1)[0]
    for kept in (1, 2, 3):
        cut = sampling._cut(logits, mass[kept - 1], sampling._Options(1, MAX, 0, nucleus=True))
        assert jnp.isfinite(cut).sum() == kept


def test_draws_are_a_function_of_the_key():
    jax.tree.map(np.testing.assert_array_equal, draw(4, 7, 5), draw(4, 7, 5))
    assert (draw(4, 7, 50).tokens != draw(4, 8, 50).tokens).any()


def test_draws_of_a_sentence_go_with_its_number():
    """Wherever it stands, and whatever stands beside it."""
    together = draw(4, 7, 5)
    alone = decoding.sample(
        Table(), jnp.asarray(tables(4)), jnp.array([[1]]), jax.random.key(7),
        numbers=np.array([1]), samples=5, max_length=MAX,
    )  # fmt: skip
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[0])


def test_hypotheses_of_a_sentence_are_drawn_under_consecutive_numbers():
    """Hypothesis j of k, of sentence number i, has the draws of the only one of number i k + j."""
    draw = functools.partial(
        decoding.sample, Table(), jnp.asarray(tables(4)), key=jax.random.key(7), max_length=MAX
    )
    together = draw(source=jnp.array([[1]]), numbers=np.array([2]), samples=3)
    alone = draw(source=jnp.array([[1]] * 3), numbers=np.array([6, 7, 8]))
    assert sorted(together.tokens[0].tolist()) == sorted(alone.tokens[:, 0].tolist())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="hypotheses=0"):
        run(0, beam=0)
    with pytest.raises(ValueError, match="min_length"):
        run(0, beam=1, min_length=MAX + 1)
    with pytest.raises(ValueError, match="temperature"):
        draw(0, 0, 1, temperature=0.0)
    with pytest.raises(ValueError, match="top_p"):
        draw(0, 0, 1, top_p=1.5)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="temperature"):
            draw(0, 0, 1, temperature=wrong)
        with pytest.raises(ValueError, match=f"length_penalty={wrong}"):
            run(0, beam=1, length_penalty=wrong)
    none = np.ones((0, 2), np.int32)
    with pytest.raises(ValueError, match="source"):
        decoding.greedy(Table(), jnp.asarray(tables(0)), none, max_length=MAX)


def test_every_sentence_has_a_number(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    with pytest.raises(ValueError, match=r"numbers of shape \(3,\)"):
        draw(0, 0, 1, numbers=np.arange(3))


# ---------------------------------------------------------------------------- ensembles


def ensemble(*seeds):
    members = decoding.Ensemble(tuple(Table() for _ in seeds))
    return members, tuple(jnp.asarray(tables(seed)) for seed in seeds)


SOURCE = np.array([[0], [1]], np.int32)


@pytest.mark.parametrize("seeds", [(3, 4), (3, 4, 5)])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_an_ensemble_scores_by_the_mean_of_the_log_probabilities(seeds, penalty):
    found = decoding.beam_search(
        *ensemble(*seeds), SOURCE, beam=3 + 9 + 27 + 81, max_length=MAX, length_penalty=penalty
    )
    for sentence in (0, 1):
        members = zip(*(everything(seed, sentence) for seed in seeds), strict=True)
        expected = [
            (same[0][0], np.mean([scores for _, scores in same], axis=0)) for same in members
        ]
        by_score = sorted(expected, key=lambda e: -sum(e[1]) / len(e[0]) ** penalty)
        compare(found, sentence, by_score, penalty)


def test_an_ensemble_of_equal_models_is_that_model():
    many = decoding.beam_search(*ensemble(7, 7), SOURCE, beam=4, max_length=MAX)
    one = run(7, beam=4)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.scores, one.scores, atol=1e-5)


def test_an_ensemble_of_ensembles():
    """Their scores are log probabilities already; a mean of these need not sum to one."""
    two, variables = ensemble(3, 4)
    nested = decoding.Ensemble([two, two])
    found = decoding.beam_search(nested, [variables, variables], SOURCE, beam=4, max_length=MAX)
    expected = decoding.beam_search(two, variables, SOURCE, beam=4, max_length=MAX)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    with pytest.raises(ValueError, match=r"1 models .* 2"):
        decoding.greedy(nested, (variables,), SOURCE, max_length=MAX)


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_search_with_x64(early_stop):
    options = {"beam": 4, "max_length": MAX, "early_stop": early_stop}
    with jax.enable_x64(True):
        found = decoding.beam_search(*ensemble(7), SOURCE, **options)
    np.testing.assert_array_equal(found.tokens, run(7, beam=4, early_stop=early_stop).tokens)


def test_greedy_and_samples_of_an_ensemble():
    members = ensemble(3, 4)
    found = decoding.greedy(*members, SOURCE, max_length=MAX)
    for sentence in (0, 1):
        prefix = ()
        while not prefix or prefix[-1] != END:
            each = [log_p(tables(seed), sentence, prefix) for seed in (3, 4)]
            mean = np.mean(each, axis=0)
            mean[PAD] = -np.inf
            mean[END] = mean[END] if len(prefix) >= 1 else -np.inf
            prefix = (*prefix, END if len(prefix) == MAX else int(mean.argmax()))
        assert found.tokens[sentence, 0, : len(prefix)].tolist() == list(prefix)
    draws = [
        decoding.sample(*members, SOURCE, jax.random.key(seed), max_length=MAX, samples=3)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0].tokens, draws[1].tokens)
    assert not np.array_equal(draws[0].tokens, draws[2].tokens)


def test_members_of_other_vocabularies():
    with pytest.raises(ValueError, match=r"end=2.*end=3"):
        decoding.Ensemble((Table(), Table(end=3)))
    with pytest.raises(ValueError, match="vocab"):
        decoding.Ensemble(
            (
                decoding.Ensemble((Sized(target_vocab=5),)),
                decoding.Ensemble((Sized(target_vocab=6),)),
            )
        )
    assert (
        decoding.Ensemble(
            (decoding.Ensemble((Sized(target_vocab=5),)), Sized(target_vocab=5))
        ).target_vocab
        == 5
    )
    with pytest.raises(ValueError, match="0 models"):
        decoding.Ensemble(())


@pytest.mark.parametrize("operator", ["S", "T", "A", "E", "D", "M"])
def test_a_split_batch_passes_no_cache_between_devices(operator):
    """Each device has the hypotheses of its sentences: none is read from another for a token."""
    module = create_model(
        "muse", layout=f"S{operator}", depths=(1, 1), widths=(16, 16), heads=(2, 2),
        hidden=(16, 16), source_vocab=20, target_vocab=20,
    )  # fmt: skip
    source = jnp.ones((4, 6), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), source, source, train=False))
    everywhere, split = (NamedSharding(Mesh(jax.devices(), ("data",)), P(*axes))
                         for axes in ((), ("data",)))  # fmt: skip
    search = jax.jit(
        lambda variables, source: decoding.beam_search(
            module, variables, source, beam=3, max_length=8
        ),
        in_shardings=(everywhere, split),
        out_shardings=split,
    )
    program = hlo.Program(search.lower(shapes, source).compile().as_text())
    sent = {c.shape for c in collectives.collectives(program)}
    # Whether all are done, the step, and the scores: XLA on CPU does not split `top_k`.
    assert sent == {(), (1,), (4, 3 * 20)}
