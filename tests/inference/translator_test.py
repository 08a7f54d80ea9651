# SPDX-License-Identifier: Apache-2.0
"""Translations against hypotheses of the published code; independence of the rest of the batch."""

import json
import pathlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localglobal_jax as lg
from localglobal_jax.checkpoints import manager
from localglobal_jax.config import loading, schema
from localglobal_jax.convert import fairseq, weights
from localglobal_jax.data.text.tokenizers import (
    EOS,
    SPECIAL,
    UNK,
    Dictionary,
    Tokenizers,
    train_sentencepiece,
)
from localglobal_jax.inference import heat_map
from localglobal_jax.inference.translator import (
    Sampling,
    Translation,
    Translator,
    _cross_attention,
    bucket_of,
    defaults,
    rows_of,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WORDS = [f"w{i}" for i in range(SPECIAL, 40)]  # a word for every id: "w17" is 17
FIXTURES = ("muse_post", "muse_pre", "muse_simple_post", "muse_simple_pre")
SHORT = {"max_length": 6}


@cache
def fixture(name):
    read = json.loads((GOLDEN / f"{name}.json").read_text())
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    state = weights.read_safetensors(GOLDEN / f"{name}.safetensors")
    words = Dictionary(WORDS)
    translator = Translator(*fairseq.load(read["args"], state), Tokenizers(words, words))
    return translator, arrays, read["beam"]


forward = jax.jit(lambda module, *inputs: module.apply(*inputs), static_argnums=0)


def text(ids):
    return " ".join(f"w{i}" for i in ids if i >= SPECIAL)


def tokens(translation):
    return [hypothesis.tokens for hypothesis in translation.hypotheses]


# ---------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("name", FIXTURES)
def test_every_line_gets_the_beams_of_the_published_code(name):
    """Of the sentence alone; without a convolution padding has no effect: of a batch, too."""
    translator, arrays, options = fixture(name)
    side = "left" if name == "muse_simple_post" else "single"
    found = translator.translate(
        [text(row) for row in arrays[f"{side}/src_tokens"]],
        beam=options["beam"],
        nbest=options["beam"],
        length_penalty=options["lenpen"],
        max_length=options["max_len_b"],
        min_length=options["min_len"],
    )
    for row, translation in enumerate(found):
        expected = [tuple(h[h >= 0].tolist()) for h in arrays[f"{side}/beam_tokens"][row]]
        assert tokens(translation) == expected
        scores = [hypothesis.score for hypothesis in translation.hypotheses]
        np.testing.assert_allclose(scores, arrays[f"{side}/beam_scores"][row], atol=1e-4)
        assert translation.text == text(expected[0])


def test_scores_are_those_of_the_model():
    translator, _, _ = fixture("muse_post")
    (found,) = translator.translate(["w9 w5 w30"], nbest=3, length_penalty=0.7, **SHORT)
    scores = [hypothesis.score for hypothesis in found.hypotheses]
    assert len(scores) == len(set(tokens(found))) == 3
    assert scores == sorted(scores, reverse=True)
    source = jnp.array([[9, 5, 30, EOS]], jnp.int32)
    for hypothesis in found.hypotheses:
        length = len(hypothesis.tokens)
        target = jnp.array([EOS, *hypothesis.tokens[:-1], *[1] * 9], jnp.int32)[None, :7]
        logits, _ = forward(translator.module, translator.variables, source, target)
        every = jax.nn.log_softmax(logits[0])
        log_p = [float(every[t, token]) for t, token in enumerate(hypothesis.tokens)]
        np.testing.assert_allclose(hypothesis.token_scores, log_p, atol=1e-4)
        np.testing.assert_allclose(hypothesis.score, sum(log_p) / length**0.7, atol=1e-4)


# ---------------------------------------------------------------------------- company and order

LINES = ["w4 w5", "", "w27 w17 w38 w6 w36", "  \t ", "w39", "w5 nonsense w4", text(range(4, 24)),
         " w4   w5 "]  # fmt: skip


@cache
def alone(line):
    return fixture("muse_post")[0].translate([line], **SHORT)[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(range(len(LINES))), unique=True),
    batch_size=st.sampled_from([1, 2048]),
)
def test_a_line_does_not_depend_on_the_others(chosen, batch_size):
    lines = [LINES[i] for i in chosen]
    translator = fixture("muse_post")[0]
    found = translator.translate(lines, batch_size=batch_size, **SHORT)
    assert len(found) == len(lines)
    for line, translation in zip(lines, found, strict=True):
        assert tokens(translation) == tokens(alone(line))
        assert translation.text == alone(line).text
        assert bool(translation.text) == bool(line.strip())
        if line.strip():
            scores = translation.hypotheses[0].token_scores
            np.testing.assert_allclose(scores, alone(line).hypotheses[0].token_scores, atol=1e-5)


def test_blanks_are_squeezed_and_unknown_words_are_unknown():
    assert alone("w4 w5") == alone(" w4   w5 ")
    assert alone("w5 nonsense w4").tokens == 4


def test_few_shapes():
    lengths = range(1, 1025)
    assert {bucket_of(n) for n in lengths} == {16, 32, 64, 128, 256, 512, 1024}
    assert all(n <= bucket_of(n) < max(17, 2 * n) for n in lengths)
    for most in (1, 7, 128):
        rows = {rows_of(n, most) for n in range(1, 300)}
        assert max(rows) == most and len(rows) <= 5
        assert all(rows_of(n, most) >= min(n, most) for n in range(1, 300))
    assert rows_of(1, 128) == 1


def test_a_line_that_is_too_long_says_so():
    translator, _, _ = fixture("muse_post")
    long = text([7] * 20)
    found = translator.translate([long, "w4 w5", ""], max_source=20, **SHORT)
    problem = "21 tokens, but at most 20 are translated (max_source)"
    assert found[0] == Translation(21, (), problem)
    assert found[1:] == [alone("w4 w5"), alone("")]
    assert translator.translate([long], max_source=21, **SHORT)[0].text


@pytest.mark.parametrize(
    "options",
    [{"beam": 0}, {"nbest": 5}, {"nbest": 0}, {"batch_size": 0}, {"max_length": 0},
     {"min_length": 9, "max_length": 8}],
)  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fixture("muse_post")[0].translate(["w4"], **options)


def test_a_translation_may_be_longer_than_the_default_if_it_must():
    translator, _, _ = fixture("muse_post")
    (found,) = translator.translate(["w4"], beam=1, min_length=40)
    assert len(found.hypotheses[0].tokens) > 40


# ---------------------------------------------------------------------------- sampling


def test_draws_are_a_function_of_seed_and_line_number():
    translator, _, _ = fixture("muse_simple_post")

    def draw(lines, first=0, **options):
        sampling = Sampling(**{"seed": 3, **options})
        found = translator.translate(lines, nbest=2, sampling=sampling, first=first, **SHORT)
        return [tokens(translation) for translation in found]

    many = draw(["w4 w5"] * 4)
    assert len(set(map(tuple, many))) == 4
    among_others = draw(["", "w4 w5", "w6", "w4 w5", text(range(4, 15)), "w7 w8"])
    assert [among_others[i] for i in (1, 3)] == [many[i] for i in (1, 3)]
    assert draw(["w4 w5"] * 2, first=2) == many[2:]
    assert draw(["w4 w5"] * 4, seed=4) != many
    (cold,) = draw(["w4 w5"], temperature=1e-4)
    assert cold[0] == cold[1] == tokens(translator.translate(["w4 w5"], beam=1, **SHORT)[0])[0]


# ---------------------------------------------------------------------------- one line is one line


class Bytes(Dictionary):
    """Says what a vocabulary of bytes can say."""

    def decode(self, ids):
        return "a\nb\r\tc\0" + super().decode(ids)


def test_a_translation_is_one_line():
    words = Bytes(WORDS)
    module, variables = fixture("muse_post")[0].module, fixture("muse_post")[0].variables
    translator = Translator(module, variables, Tokenizers(words, words))
    (found,) = translator.translate(["w4 w5"], **SHORT)
    assert found.text == f"a b  c {alone('w4 w5').text}"


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["muse_post", "muse_simple_post"])
def test_attention_of_a_sentence_and_its_translation(name):
    translator, _, _ = fixture(name)
    line = "w27 w17 w38 w6 w36"
    (found,) = translator.translate([line], **SHORT)
    weights, source, target, title = translator.attention(line, found.hypotheses[0])
    assert source == [*line.split(), "</s>"]
    assert target == [*found.text.split(), "</s>"]
    assert weights.shape == (len(target), len(source))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert title == "cross-attention, mean of 2 layers and 4 heads"


def test_attention_is_that_of_the_published_code():
    """It recorded the mean over the heads of the last layer."""
    translator, arrays, _ = fixture("muse_pre")
    source, target = (
        jnp.asarray(arrays[f"single/{name}"], jnp.int32)
        for name in ("src_tokens", "prev_output_tokens")
    )
    layers = _cross_attention(translator.module, translator.variables, source, target)
    assert len(layers) == 2
    np.testing.assert_allclose(layers[-1].mean(1), arrays["single/decoder_attn_last"], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (3, 300)])
def test_the_picture_is_drawn(tmp_path, shape):
    rows, columns = (["$a_{x", "</s>", "\u2581\u4e2d"] * 3)[: shape[0]], ["word"] * shape[1]
    file = tmp_path / "attention.png"
    heat_map.draw(
        str(file), np.random.default_rng(0).random(shape), rows=rows, columns=columns,
        title="t", row_name="r", column_name="c",
    )  # fmt: skip
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width > 15 * shape[1] and height > 15 * shape[0]


def test_characters_that_no_font_has_are_logged_once(tmp_path, caplog):
    heat_map._warn_of_boxes.cache_clear()
    texts = {"title": "t", "row_name": "r", "column_name": "c", "columns": ["a"]}
    with caplog.at_level("WARNING"):
        heat_map.draw(str(tmp_path / "a.png"), np.ones((1, 1)), rows=["b"], **texts)
        assert not caplog.messages
        for _ in range(2):
            heat_map.draw(str(tmp_path / "a.png"), np.ones((1, 1)), rows=["\U0010fffd"], **texts)
    (text,) = caplog.messages
    assert "font.family" in text


def test_a_heat_map_that_cannot_be_written_raises_first(tmp_path):
    heat_map.check(str(tmp_path / "x.svg"))
    with pytest.raises(ValueError, match=r"x\.jpg"):
        heat_map.check(str(tmp_path / "x.jpg"))
    with pytest.raises(ValueError, match="nowhere"):
        heat_map.check(str(tmp_path / "nowhere" / "x.png"))


@pytest.mark.parametrize("sampling", [None, Sampling(seed=0)])
def test_scores_that_are_not_finite_are_said(sampling):
    good = fixture("muse_post")[0]
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good.variables)
    bad = Translator(good.module, nan, good.tokenizers)
    (found,) = bad.translate(["w5 w6"], beam=2, sampling=sampling, **SHORT)
    assert not found.hypotheses and "finite" in found.problem


# ---------------------------------------------------------------------------- from disk


def test_wrong_parts():
    words = Dictionary(WORDS[:-1])
    translator = fixture("muse_post")[0]
    with pytest.raises(ValueError, match="source_vocab=40"):
        Translator(translator.module, translator.variables, Tokenizers(words, words))
    for name, fields in (("coatnet", {}), ("muse", {"layout": "M", "depths": (1,)})):
        module = lg.create_model(name, **fields)
        with pytest.raises(ValueError, match=type(module).__name__):
            Translator(module, {}, Tokenizers(words, words))


def test_beam_and_length_penalty_are_those_of_the_run(tmp_path):
    assert defaults(tmp_path) == {"beam": 4, "length_penalty": 1.0}
    task = {"name": "translation", "beam": 7, "length_penalty": 0.3}
    run = schema.TranslationRun(model={"name": "muse"}, task=task)
    saved = manager.Checkpoints(tmp_path / "checkpoints", schema.Checkpoints())
    metadata = {"config": run.model_dump(mode="json")}
    saved.save(4, {"variables": {"x": np.zeros(1, np.float32)}}, metadata=metadata)
    saved.close()
    (tmp_path / "config.json").write_text(loading.to_json(run))
    for path in ("", "checkpoints", "checkpoints/4"):
        assert defaults(tmp_path / path) == {"beam": 7, "length_penalty": 0.3}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_become_the_text_of_their_ids(kind):
    texts = [f"the house {i} is green, and so is number {i * 7}" for i in range(200)]
    tokenizer = train_sentencepiece(texts, 340, kind)
    for text in (*texts[:9], "a word of others: übermäßig"):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == text
    assert tokenizer.join(["▁the", "▁HOUSE", "▁is"]) == "the HOUSE is"
    assert Dictionary(["a@@", "b"]).join(["a@@", "b", "c"]) == "ab c"


@pytest.mark.parametrize("place", [0, 2])
def test_unknown_words_are_replaced_by_attention(place, monkeypatch):
    """As fairseq's --replace-unk, on the text as it was given."""
    translator, _, _ = fixture("muse_post")
    line = "w9 new w30 w17 other w22"
    (plain,) = translator.translate([line], **SHORT)
    assert plain.unknown == 2
    tokens = list(plain.hypotheses[0].tokens)
    tokens[place] = UNK
    unsure = plain.hypotheses[0]._replace(tokens=tuple(tokens), text="not used")
    weights = translator.attention(line, unsure).weights[place, :-1]  # without the end token
    wanted = [f"w{token}" for token in tokens if token != EOS]
    wanted[place] = line.split()[int(weights.argmax())]
    monkeypatch.setattr(translator, "_read", lambda *_: (unsure,))
    (found,) = translator.translate([line], replace_unknown=True, **SHORT)
    assert found.text == " ".join(wanted)
    assert translator.translate([line], **SHORT)[0].text == "not used"


def test_attention_needs_words():
    translator, _, _ = fixture("muse_post")
    (found,) = translator.translate(["w27 w17"], **SHORT)
    with pytest.raises(ValueError, match="no words"):
        translator.attention("  ", found.hypotheses[0])
