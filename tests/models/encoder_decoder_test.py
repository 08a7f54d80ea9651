# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders. ``python tests/models/encoder_decoder_test.py`` rewrites the golden tree."""

import json
import pathlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from localglobal_jax import create_model
from localglobal_jax.blocks.sequence import SEQUENCE_BLOCKS
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import decoding
from localglobal_jax.models.encoder_decoder import VARIANTS, EncoderDecoder, sinusoids

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OFFICIAL = json.loads((GOLDEN / "muse_models.json").read_text())
TINY = {
    "source_vocab": 13,
    "target_vocab": 11,
    "embeddings": "separate",
    "depths": (2, 2),
    "widths": (8, 12),
    "heads": (2, 3),
    "hidden": (6, 10),
}
EVERY_LETTER = {
    **TINY,
    "layout": ("MDA", "STME"),
    "depths": (3, 4),
    "pre_norm": (True, False),
    "blocks": {
        "A": {"window": 3},
        "D": {"window": 3},
        "E": {"furthest": 2},
        "M": {"windows": (3, 5), "gate": False},
        "T": {"furthest": 4},
    },
}
MODELS = {
    "MM": {},
    "MM, pre": {"pre_norm": (True, True), "layout": "MM"},
    "MM, separate": {"blocks": {"M": {"projection": "separate", "windows": (3,)}}},
    "MM, growing": {"blocks": {"M": {"windows": ((3,), (7,))}}},
    "SS": {"layout": "SS"},
    "TT": {"layout": "TT", "positions": "none", "pre_norm": (True, True)},
    "DD": {"layout": "DD", "blocks": {"D": {"window": (3, 7)}}},
    "AA": {"layout": "AA", "blocks": {"A": {"window": (3, 4)}}},
    "EE": {"layout": "EE", "positions": "none", "blocks": {"E": {"furthest": 2}}},
    "mixed": EVERY_LETTER,
}
SOURCE = jnp.array([[4, 5, 6, 7, 8, 9, 2], [1, 1, 1, 10, 4, 5, 2], [6, 5, 2, 1, 1, 1, 1]])
TARGET = jnp.array([[2, 3, 4, 5, 6], [2, 7, 8, 1, 1], [1, 2, 9, 4, 1]])

forward = jax.jit(
    lambda module, v, *tokens: module.apply(v, *tokens, train=False), static_argnums=0
)


@partial(jax.jit, static_argnums=0)
def one_by_one(module, variables, source, target):
    memory, cache = module.apply(variables, source, target.shape[1], method="init_cache")

    def step(cache, token):
        logits, cache = module.apply(variables, token, memory, cache, method="step")
        return cache, logits

    return jax.lax.scan(step, cache, target.T)[1].swapaxes(0, 1)


@cache
def made(name):
    module = create_model("muse", **{**TINY, **MODELS[name]})
    init = jax.jit(lambda key: module.init(key, SOURCE, TARGET, train=False))
    return module, init(jax.random.key(1))


def shapes(module, *tokens):
    tokens = tokens or (jnp.ones((1, 2), int),) * 2
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *tokens))


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------- sizes and trees


def test_the_default_tokens_are_those_of_the_tokenizers():
    module = EncoderDecoder()
    assert (module.pad, module.start, module.end) == (
        tokenizers.PAD,
        tokenizers.EOS,
        tokenizers.EOS,
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # the first and the fourth as the authors' own runs printed them, less norms never called
        ("muse_iwslt", 48_193_584 - 9_216),
        ("muse_simple_iwslt", 43_981_824),
        ("muse_wmt_en_de", 243_050_544),
        ("muse_wmt_en_fr", 252_088_368 - 18_432),
        ("transformer_iwslt", 42_864_640),
        ("transformer_base", 60_915_712),
        ("transformer_big", 209_911_808),
    ],
)
def test_parameters(name, parameters):
    assert count(shapes(create_model(name))) == parameters


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("muse_iwslt", "iwslt_de_en_muse"),
        ("muse_simple_iwslt", "iwslt_de_en_muse_simple"),
        ("muse_wmt_en_de", "wmt16_en_de_muse"),
    ],
)
def test_parameters_are_the_official_ones(name, official):
    theirs = OFFICIAL[official]
    ours = shapes(create_model(name, source_vocab=1000, target_vocab=1000))
    unused = theirs["of_which_unused_layernorms"]
    assert count(ours) == theirs["n_params_at_vocab_1000"] - unused
    assert count({k: v for k, v in ours["params"].items() if k in ("encoder", "decoder")}) == (
        theirs["n_params_without_embeddings"] - unused
    )


def test_every_variant_is_tested_above():
    assert len(VARIANTS) == 7


def tree():
    leaves = jax.tree_util.tree_leaves_with_path(shapes(create_model("muse", **EVERY_LETTER)))
    return "".join(f"{'/'.join(k.key for k in path)} {list(leaf.shape)}\n" for path, leaf in leaves)


def test_the_tree_is_public():
    assert tree() == (GOLDEN / "muse_tree.txt").read_text()


# ---------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_parallel_pass(name):
    module, variables = made(name)
    logits, _ = forward(module, variables, SOURCE, TARGET)
    steps = one_by_one(module, variables, SOURCE, TARGET)
    real = np.asarray(module.pad != TARGET)
    np.testing.assert_allclose(steps[real], logits[real], atol=5e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_sentence_does_not_depend_on_its_company_or_on_where_its_padding_is(name):
    module, variables = made(name)
    logits, intermediates = forward(module, variables, SOURCE, TARGET)
    for source, target, row in (
        ([[10, 4, 5, 2]], [[2, 7, 8]], 1),
        ([[6, 5, 2, 1, 1], [4, 4, 4, 4, 2]], [[1, 1, 2, 9, 4], [2, 3, 4, 5, 6]], 2),
    ):
        alone, inside = forward(module, variables, jnp.array(source), jnp.array(target))
        real = np.asarray(jnp.array(target[0]) != module.pad)
        there = np.asarray(TARGET[row] != module.pad)
        np.testing.assert_allclose(alone[0, real], logits[row, there], atol=5e-6)
        real = np.asarray(jnp.array(source[0]) != module.pad)
        there = np.asarray(SOURCE[row] != module.pad)
        np.testing.assert_allclose(
            inside["encoder"][0, real], intermediates["encoder"][row, there], atol=5e-6
        )


def test_in_the_published_way_it_does():
    module, variables = made("MM")
    module = module.clone(pad_values="keep")
    together, _ = forward(module, variables, SOURCE, TARGET)
    alone, _ = forward(module, variables, SOURCE[1:2, 3:], TARGET[1:2])
    assert np.abs(together[1, :3] - alone[0, :3]).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_no_logit_sees_a_later_token_and_all_see_the_source(name):
    module, variables = made(name)

    def loss(tables, at):
        params = {**variables["params"], **tables}
        logits, _ = module.apply({"params": params}, SOURCE[:1], jnp.array([[2, 3, 4, 5, 6]]))
        return (logits[0, at] ** 2).sum()

    names = ("source_embedding", "target_embedding")
    tables = {name: variables["params"][name] for name in names}
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(tables, jnp.arange(5))
    moves = np.abs(gradient["target_embedding"]["embedding"]).max(-1) > 0
    for at in range(5):
        assert moves[at, [2, 3, 4, 5, 6]].tolist() == [i <= at for i in range(5)]
    source = np.abs(gradient["source_embedding"]["embedding"]).max(-1) > 0
    assert source[:, np.unique(SOURCE[0])].all()


@pytest.mark.parametrize("name", ["MM", "mixed"])
def test_a_beam_is_scored_as_the_parallel_pass_scores_it(name):
    module, variables = made(name)
    found = decoding.beam_search(module, variables, SOURCE, beam=3, max_length=6)
    for beam in range(3):
        tokens = found.tokens[:, beam]
        start = jnp.full((3, 1), module.start)
        logits, _ = forward(module, variables, SOURCE, jnp.concatenate([start, tokens[:, :-1]], 1))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], 2)[..., 0]
        real = np.arange(7)[None] < found.lengths[:, beam, None]
        expected = np.where(real, log_p, 0)
        np.testing.assert_allclose(found.token_scores[:, beam], expected, atol=1e-5)
        scores = expected.sum(1) / found.lengths[:, beam]
        np.testing.assert_allclose(found.scores[:, beam], scores, atol=1e-5)


@pytest.mark.parametrize("letter", SEQUENCE_BLOCKS)
def test_without_positions_an_encoder_moves_along(letter):
    """Inside its padding always; over the edge where a sentence is a ring (E) or a set (S)."""
    one = {k: v[:1] for k, v in TINY.items() if k in ("depths", "widths", "heads", "hidden")}
    options = {"T": {"furthest": 3}, "E": {"furthest": 2}, "A": {"window": 5}}
    fields = {"layout": letter, "positions": "none", "pre_norm": (False,), "blocks": options}
    module = create_model("muse", source_vocab=13, **{**one, **fields})
    variables = jax.jit(module.init)(jax.random.key(0), SOURCE)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [v + 0.3 * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    padded, full = np.array(
        [[4, 5, 6, 7, 8, 9, 3, 1, 1, 1, 1], [4, 5, 6, 7, 8, 9, 3, 10, 11, 12, 2]]
    )
    rolled = [np.roll(row, shift) for row in (padded, full) for shift in range(11)]
    encoded, _ = forward(module, jax.tree.unflatten(structure, leaves), jnp.array(rolled))
    for row, part in ((padded, encoded[:11]), (full, encoded[11:])):
        back = np.array([np.roll(y, -shift, 0) for shift, y in enumerate(part)])
        error = np.abs(back - back[:1])[:, row != module.pad].max((1, 2))
        inside = 1 + (row == module.pad).sum()
        assert error[:inside].max() < 1e-5
        assert error.max() < 1e-5 if letter in "ES" else error[inside:].min() > 1e-3


def test_decoding_does_not_depend_on_the_batch():
    module, variables = made("MM")
    search = partial(decoding.beam_search, module, variables, beam=2, max_length=5)
    together, alone = search(SOURCE), search(SOURCE[1:2, 3:])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(together.scores[1], alone.scores[0], atol=1e-5)


def test_positions():
    """Real tokens count from pad + 1; sines first, then cosines; padding has none."""
    waves = sinusoids(jnp.array([[0, 1, 5]]), 7)
    assert waves.shape == (1, 3, 7)
    np.testing.assert_allclose(waves[0, 0], [0, 0, 0, 1, 1, 1, 0])
    np.testing.assert_allclose(waves[0, 2, [0, 3]], [np.sin(5), np.cos(5)], rtol=1e-6)
    np.testing.assert_allclose(waves[0, 2, 2], np.sin(5e-4), rtol=1e-4)


def test_fused_changes_no_number():
    module, variables = made("MM")
    fused = module.clone(blocks={"M": {"fused": True}})

    a, b = (forward(m, variables, SOURCE, TARGET)[0] for m in (module, fused))
    np.testing.assert_allclose(a, b, atol=5e-6)
    np.testing.assert_allclose(
        one_by_one(fused, variables, SOURCE, TARGET),
        one_by_one(module, variables, SOURCE, TARGET),
        atol=5e-6,
    )


def test_embeddings_shared_or_tied():
    one = {"source_vocab": 9, "target_vocab": 9, "widths": (8, 8), "heads": (2, 2)}
    expected = {
        "shared": {"embedding"},
        "decoder": {"source_embedding", "target_embedding"},
        "separate": {"source_embedding", "target_embedding", "output_embedding"},
    }
    for embeddings, names in expected.items():
        module = create_model("muse", **{**TINY, **one, "embeddings": embeddings})
        assert set(shapes(module)["params"]) == names | {"encoder", "decoder"}
    module, variables = made("MM")
    for table in ("source", "target", "output"):
        embedding = variables["params"][f"{table}_embedding"]["embedding"]
        assert not embedding[module.pad].any() and embedding[module.pad + 1].all()


def test_an_encoder_alone():
    fields = {"layout": "M", **{k: (n,) for k, n in [("depths", 2), ("widths", 8), ("heads", 2)]}}
    module = create_model("muse", source_vocab=13, hidden=(6,), pre_norm=(False,), **fields)
    variables = module.init(jax.random.key(0), SOURCE)
    assert set(variables["params"]) == {"embedding", "encoder"}
    encoded, intermediates = module.apply(variables, SOURCE)
    assert encoded.shape == (3, 7, 8) and set(intermediates) == {
        "encoder", "encoder_layer1", "encoder_layer2",
    }  # fmt: skip
    np.testing.assert_array_equal(encoded, module.apply(variables, SOURCE, method="encode"))


def test_bfloat16_activations_float32_parameters_and_logits():
    module, variables = made("MM")
    half = module.clone(dtype="bfloat16")
    logits, intermediates = forward(half, variables, SOURCE, TARGET)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in intermediates.values()} == {jnp.bfloat16.dtype}
    assert {x.dtype for x in jax.tree.leaves(shapes(half))} == {jnp.float32.dtype}
    reference, _ = forward(module, variables, SOURCE, TARGET)
    np.testing.assert_allclose(logits, reference, atol=0.1 * np.abs(reference).max())
    _, cache = half.apply(variables, SOURCE, 3, method="init_cache")
    assert cache["layer1"]["key"].dtype == jnp.bfloat16
    assert {x.shape[0] for x in jax.tree.leaves(cache)} == {3}


@pytest.mark.parametrize("name", MODELS)
def test_matrices_rounded_once_change_no_bit_of_a_step(name):
    module, variables = made(name)
    module = module.clone(dtype="bfloat16")
    rounded = module.narrowed(variables)
    types = {
        path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(rounded)
    }
    assert types["kernel"] == types["embedding"] == jnp.bfloat16
    assert types["scale"] == jnp.float32

    @jax.jit
    def two_steps(variables):
        memory, cache = module.apply(variables, SOURCE, 4, method="init_cache")
        first, cache = module.apply(variables, TARGET[:, 0], memory, cache, method="step")
        second, _ = module.apply(variables, TARGET[:, 1], memory, cache, method="step")
        return first, second

    jax.tree.map(np.testing.assert_array_equal, two_steps(rounded), two_steps(variables))


@pytest.mark.parametrize("name", ["MM", "mixed"])
def test_training_is_noisy_and_has_gradients_everywhere(name):
    module, variables = made(name)
    module = module.clone(dropout=0.3, attention_dropout=0.1)

    @jax.jit
    def gradient(key):
        def loss(v):
            logits, _ = module.apply(v, SOURCE, TARGET, train=True, rngs={"dropout": key})
            return -jax.nn.log_softmax(logits)[:, :, 3].mean()

        return jax.grad(loss)(variables)

    one, two = gradient(jax.random.key(0)), gradient(jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
        assert np.isfinite(leaf).all() and leaf.any(), path
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


def test_works_in_nnx():
    module, _ = made("MM")
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(SOURCE, TARGET)
    logits, _ = model(SOURCE, TARGET)
    assert logits.shape == (3, 5, 11)


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "MX"}, '"MX": "X"'),
        ({"depths": (1,)}, r"depths=\(1,\)"),
        ({"heads": (2,)}, r"heads=\(2,\)"),
        ({"embeddings": "shared"}, "embeddings=shared"),
        ({"blocks": {"M": {"window": 3}}}, 'block M: "window".*"windows"'),
        ({"blocks": {"M": {"dropout": 0.1}}}, "blocks: dropout of block M"),
        ({"blocks": {"M": {"windows": "3, 5"}}}, "block M: windows='3, 5'"),
        ({"blocks": {"M": {"windows": ((3,), (0,))}}}, r"block M: windows=\(0,\)"),
        ({"blocks": {"M": {"ffn": "of"}}}, "block M: ffn='of'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"heads": (2, 0)}, r"heads=\(2, 0\)"),
        ({"blocks": {"M": {"windows": ((3,),)}}}, "windows=.*layer 2"),
        ({"layout": "MMM", **{k: (2,) * 3 for k in ("depths", "heads", "hidden")},
          "widths": (8,) * 3, "pre_norm": (True,) * 3}, '"MMM"'),
    ],
)  # fmt: skip
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        shapes(create_model("muse", **{**TINY, **fields}))


def test_a_missing_target():
    module, variables = made("MM")
    with pytest.raises(ValueError, match="target"):
        module.apply(variables, SOURCE)


if __name__ == "__main__":
    (GOLDEN / "muse_tree.txt").write_text(tree())
