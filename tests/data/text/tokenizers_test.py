# SPDX-License-Identifier: Apache-2.0
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.config import schema
from localglobal_jax.data.text import tokenizers

LINES = [
    f"{who} {what} the {thing} ({n})."
    for n, (who, what, thing) in enumerate(
        (who, what, thing)
        for who in ("Anna", "Björn", "the user")
        for what in ("opens", "closes", "deletes", "renames")
        for thing in ("document", "Datei", "spreadsheet", "Ordner", "naïve list")
    )
]
SIZE = 310
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request):
    return tokenizers.train_sentencepiece(LINES, SIZE, request.param)


def test_special_ids_are_fairseqs(subwords):
    assert (tokenizers.BOS, tokenizers.PAD, tokenizers.EOS, tokenizers.UNK, tokenizers.SPECIAL) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert subwords.size == SIZE
    ids = subwords.encode(LINES)
    assert min(min(line) for line in ids) >= tokenizers.SPECIAL
    assert max(max(line) for line in ids) < SIZE


@settings(deadline=None, max_examples=200)
@given(text=WORDS)
def test_any_text_comes_back(subwords, text):
    """Of any script, never seen in training, control characters included."""
    text = " ".join(text.split())
    (ids,) = subwords.encode([text])
    assert tokenizers.UNK not in ids
    if "\0" not in text:
        assert subwords.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, SIZE - 1), max_size=20))
def test_any_ids_are_some_text(subwords, ids):
    """What an untrained model says can be printed; nothing behind EOS counts."""
    text = subwords.decode(ids)
    text.encode()
    before = ids[: ids.index(tokenizers.EOS)] if tokenizers.EOS in ids else ids
    padded = [tokenizers.BOS, *before, tokenizers.EOS, tokenizers.PAD, tokenizers.PAD, 77]
    assert subwords.decode(np.array(padded, np.int32)) == text


def test_pieces_are_what_the_ids_stand_for(subwords):
    (ids,) = subwords.encode(["the user opens \u4e2d"])
    pieces = subwords.pieces([*ids, tokenizers.EOS])
    assert pieces[-4:] == ["<0xE4>", "<0xB8>", "<0xAD>", "</s>"]
    assert "".join(pieces[:-4]).replace("\u2581", " ").strip() == "the user opens"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_model(kind):
    code = (
        "import hashlib; from localglobal_jax.data.text.tokenizers import train_sentencepiece; "
        f"model = train_sentencepiece({LINES!r}, {SIZE}, {kind!r}).dump(); "
        "print(hashlib.sha256(model).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(tokenizers.train_sentencepiece(LINES, SIZE, kind).dump()).hexdigest()
    assert other.stdout.strip() == here


def test_a_long_line_is_not_skipped():
    """SentencePiece's own default ignores lines above 4,192 bytes."""
    long = "zyzzyva " * 1000
    model = tokenizers.train_sentencepiece([*LINES, long], SIZE, "bpe")
    assert len(model.encode(["zyzzyva"])[0]) == 1


@pytest.mark.parametrize(
    ("lines", "vocab", "message"),
    [
        (["a b", "c"], 5000, r"data\.vocab=5000 "),
        (LINES, 261, r"data\.vocab=261 .*256 of the ids are bytes"),
        ([], 300, r"data\.vocab=300 "),
    ],
)
def test_vocabularies_that_cannot_be(lines, vocab, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.train_sentencepiece(lines, vocab, "bpe")


# ---------------------------------------------------------------------------------- dictionaries


def test_a_dictionary_has_fairseqs_ids_and_joins_subwords():
    d = tokenizers.Dictionary.parse("the 10\nhou@@ 7\nse 7\n. 3\nmadeupword0000 0\n")
    assert d.size == 9
    assert d.encode(["the hou@@ se .", "a  house", ""]) == [[4, 5, 6, 7], [3, 3], []]
    assert d.decode([4, 5, 6, 7, 2, 4]) == "the house ."
    assert d.decode([0, 4, 3, 5, 1, 1]) == "the <unk> hou"
    assert d.pieces([0, 1, 2, 3, 5, 6]) == ["<s>", "<pad>", "</s>", "<unk>", "hou@@", "se"]
    assert tokenizers.Dictionary.parse(d.dump().decode()).words == d.words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 10\nhouse\n", "line 2 "),
        ("the 10\nhouse x\n", "line 2 "),
        ("", "line 1"),
        ("the 10\na 1\nthe 3\n", '"the"'),
    ],
)
def test_damaged_dictionaries(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenizers.Dictionary.parse(text)
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(ValueError, match=f"data.dicts: .*{tmp_path}/dict.txt.*{message}"):
        tokenizers.of_dictionaries([tmp_path / "dict.txt"])
    with pytest.raises(ValueError, match="nowhere"):
        tokenizers.of_dictionaries([tmp_path / "nowhere"])


# ---------------------------------------------------------------------------------------- stored


def text(**options):
    return schema.Text(vocab=300, **options)


@pytest.mark.parametrize("joint", [True, False])
def test_saved_and_loaded(tmp_path, joint):
    targets = [line[::-1] for line in LINES]
    made = tokenizers.create(text(joint=joint), LINES, targets)
    assert made.joint == joint
    assert tokenizers.load(tmp_path / "tokenizer") is None
    tokenizers.save(made, tmp_path / "tokenizer")
    tokenizers.save(made, tmp_path / "tokenizer")
    found = tokenizers.load(tmp_path / "tokenizer")
    assert found.joint == joint
    assert found.source.encode(LINES) == made.source.encode(LINES)
    assert found.target.encode(targets) == made.target.encode(targets)
    assert not list((tmp_path / "tokenizer").glob(".*"))


def test_dictionaries_saved_and_loaded(tmp_path):
    for name, words in (("de", "das 1\nHaus 1\n"), ("en", "the 5\nhouse 4\n")):
        (tmp_path / name).write_text(words)
    files = (str(tmp_path / "de"), str(tmp_path / "en"))
    made = tokenizers.create(text(tokenizer="dict", dicts=files), [], [])
    tokenizers.save(made, tmp_path / "t")
    found = tokenizers.load(tmp_path / "t")
    assert (found.source.words, found.target.words) == (["das", "Haus"], ["the", "house"])
    assert tokenizers.create(text(tokenizer="dict", dicts=files[:1]), [], []).joint


@pytest.mark.parametrize("file", ["tokenizer.json", "joint.model"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe" * 9])
def test_a_damaged_tokenizer_is_no_reason_to_train_another(tmp_path, file, damage):
    tokenizers.save(tokenizers.create(text(), LINES, LINES), tmp_path)
    (tmp_path / file).write_bytes(damage)
    with pytest.raises(ValueError, match=str(tmp_path)):
        tokenizers.load(tmp_path)


def test_every_flipped_bit_of_a_vocabulary_is_found(tmp_path):
    """SentencePiece takes many of them for another vocabulary, without a word."""
    tokenizers.save(tokenizers.create(text(), LINES, LINES), tmp_path)
    data = (tmp_path / "joint.model").read_bytes()
    for bit in range(0, 8 * len(data), 97):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "joint.model").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"joint\.model"):
            tokenizers.load(tmp_path)
    (tmp_path / "joint.model").write_bytes(data)
    index = json.loads((tmp_path / "tokenizer.json").read_text())
    del index["crc32"]  # as earlier versions wrote it
    (tmp_path / "tokenizer.json").write_text(json.dumps(index))
    assert tokenizers.load(tmp_path).source.dump() == data


def test_a_model_with_other_special_ids_is_refused():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=50, minloglevel=2
    )
    with pytest.raises(ValueError, match="pad_id"):
        tokenizers.SentencePiece(model.getvalue())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_dictionary_has_lines_of_any_system(end, tmp_path):
    (tmp_path / "dict.txt").write_bytes(f"hello 5{end}world 3{end}".encode())
    found = tokenizers.of_dictionaries([tmp_path / "dict.txt"])
    assert found.source.encode(["world hello"]) == [[5, 4]]


def test_a_dictionary_may_be_in_a_bucket(bucket):
    epath.Path(f"{bucket}/dict.txt").write_text("hello 5\nworld 3\n")
    found = tokenizers.of_dictionaries([f"{bucket}/dict.txt"])
    assert found.source.encode(["world hello"]) == [[5, 4]]
