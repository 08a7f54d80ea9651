# SPDX-License-Identifier: Apache-2.0
import gzip
import math
import os
import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.inference import bleu

REFERENCES = ["the cat sat on the mat .", "there is a dog in the garden", "yes"]
HYPOTHESES = ["the cat sat on a mat .", "a dog is in the garden", "yes"]
SOURCES = ["die Katze saß auf der Matte .", "wort " * 16, "ja"]


def bleu_by_hand(hypotheses, references):
    """Papineni et al. (2002), section 2.3, words between blanks, no smoothing."""
    hits, totals, lengths = [0] * 4, [0] * 4, [0, 0]
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        h, r = hypothesis.split(), reference.split()
        lengths = [lengths[0] + len(h), lengths[1] + len(r)]
        for n in range(1, 5):
            grams = [tuple(h[i : i + n]) for i in range(len(h) - n + 1)]
            known = [tuple(r[i : i + n]) for i in range(len(r) - n + 1)]
            totals[n - 1] += len(grams)
            hits[n - 1] += sum(min(grams.count(g), known.count(g)) for g in set(grams))
    if 0 in hits:
        return 0.0
    penalty = min(0.0, 1 - lengths[1] / lengths[0])
    logs = sum(math.log(a / b) for a, b in zip(hits, totals, strict=True))
    return 100 * math.exp(penalty + logs / 4)


def test_a_small_case_by_hand():
    found = bleu.score(HYPOTHESES, REFERENCES, tokenized=True)
    assert found["bleu"] == pytest.approx(bleu_by_hand(HYPOTHESES, REFERENCES))
    assert found["precisions"][0] == pytest.approx(100 * 13 / 14)
    assert (found["hypothesis_tokens"], found["reference_tokens"]) == (14, 15)
    assert found["brevity_penalty"] == pytest.approx(math.exp(1 - 15 / 14))
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:none|smooth:none|version:")
    assert "tok:13a|smooth:exp" in bleu.score(HYPOTHESES, REFERENCES)["signature"]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=9).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
def test_tokenised_bleu_is_the_textbook(pairs):
    hypotheses, references = zip(*pairs, strict=True)
    found = bleu.score(hypotheses, references, tokenized=True)
    assert found["bleu"] == pytest.approx(bleu_by_hand(hypotheses, references), abs=1e-6)
    perfect = bleu.score(references, references)
    if any(len(line.split()) >= 4 for line in references):
        assert perfect["bleu"] == pytest.approx(100)
    assert 0 <= found["chrf"] <= 100 + 1e-9


def test_by_length_scores_each_part_by_itself():
    found = bleu.score(HYPOTHESES, REFERENCES, SOURCES)["by_length"]
    assert [(line["words"], line["sentences"]) for line in found] == [("1-15", 2), ("16-30", 1)]
    parts = [([HYPOTHESES[i] for i in p], [REFERENCES[i] for i in p]) for p in ([0, 2], [1])]
    for line, part in zip(found, parts, strict=True):
        alone = bleu.score(*part)
        assert (line["bleu"], line["chrf"]) == (alone["bleu"], alone["chrf"])


@pytest.mark.parametrize("words", [0, 1, 15, 16, 30, 31, 45, 46, 75, 76, 90, 91, 105, 106, 900])
def test_every_length_is_in_one_bucket(words):
    (line,) = bleu.by_length(["a"], ["a"], ["x " * words])
    first, _, last = line["words"].partition("-")
    if last:
        assert int(first) <= max(1, words) <= int(last)
    else:
        assert line["words"] == ">105" and words > 105


def unspaced(lines=200, length=20):
    """Chinese lines, one character in 20 of each hypothesis wrong."""
    rng = random.Random(0)
    references = ["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(length))
                  for _ in range(lines)]  # fmt: skip
    hypotheses = [line[:9] + "錯" + line[10:] for line in references]
    return hypotheses, references


def test_chinese_is_scored_by_its_characters():
    """sacrebleu#147, OpenNMT-tf#811: without a tokenizer the score is 0, and nothing said why."""
    hypotheses, references = unspaced()
    found = bleu.score(hypotheses, references, references, tokenize="zh")
    spaced = ([" ".join(line) for line in side] for side in (hypotheses, references))
    assert found["bleu"] == pytest.approx(bleu_by_hand(*spaced))
    assert round(found["bleu"], 1) == 85.8
    assert "tok:zh" in found["signature"] and "tok:zh" in bleu.signature(tokenize="zh")
    assert [line["words"] for line in found["by_length"]] == ["16-30"]  # characters


@pytest.mark.parametrize(
    ("language", "text", "tokenizer"),
    [
        ("zh", "单击按钮以打开对话框。", "zh"),
        ("zh_Hant", "單擊按鈕", "zh"),
        (None, "单击按钮以打开对话框。", "zh"),
        ("ja", "ボタンをクリックしてダイアログを開きます。", "ja-mecab"),
        (None, "ボタンをクリックしてダイアログを開きます。", "ja-mecab"),
        ("ko", "단추를 눌러 대화 상자를 엽니다.", "ko-mecab"),
        ("th", "คลิกปุ่มเพื่อเปิดกล่องโต้ตอบ", "char"),
        (None, "คลิกปุ่มเพื่อเปิดกล่องโต้ตอบ", "char"),
        ("de", "Klicken Sie auf die Schaltfläche.", "13a"),
        (None, "Нажмите кнопку, чтобы открыть окно.", "13a"),
        (None, "单击 按钮 以 打开 对话框 。", "13a"),  # tokenised
        (None, "Press the button 按钮 to open the dialog.", "13a"),
        (None, "", "13a"),
    ],
)
def test_the_tokenizer_of_a_language(language, text, tokenizer, caplog):
    assert bleu.choose_tokenizer(language, [text]) == tokenizer
    assert bleu.score([text or "a"], [text or "a"], tokenize=tokenizer)["sentences"] == 1
    assert not caplog.messages


@pytest.mark.parametrize(
    "text", ["单击按钮以打开对话框。", "ボタンをクリック", "คลิกปุ่มเพื่อเปิดกล่องโต้ตอบ"]
)
@pytest.mark.parametrize("options", [{}, {"tokenized": True}, {"tokenize": "intl"}])
def test_a_tokenizer_that_finds_no_words_is_warned_of(text, options, caplog):
    bleu.score([text], [text], **options)
    (said,) = caplog.messages
    assert "--tokenize" in said


def test_a_tokenizer_that_is_not_there(monkeypatch, caplog):
    def missing(tokenize):
        raise RuntimeError("pip install sacrebleu[ja]")  # as sacreBLEU does without MeCab

    with pytest.raises(ValueError, match="ja-mecab"):
        bleu.check_tokenizer("mecab")
    monkeypatch.setattr(bleu.metrics, "BLEU", missing)
    with pytest.raises(ValueError, match=r"localglobal_jax\[ja\]"):
        bleu.check_tokenizer("ja-mecab")
    assert bleu.choose_tokenizer("ja", []) == "char"
    assert "localglobal_jax[ja]" in caplog.text


def test_different_or_no_lines_raise():
    with pytest.raises(ValueError, match="2 hypotheses"):
        bleu.score(["a", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 sources"):
        bleu.score(["a"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 hypotheses"):
        bleu.score([], [])


# The official system's output on the IWSLT14 test set: (id, source, target, hypothesis) a line.
# Not ours to distribute; the numbers are the paper's and its authors'.
OFFICIAL = pathlib.Path(
    os.environ.get("LOCALGLOBAL_IWSLT14_MUSE_TEST")
    or pathlib.Path(__file__).parents[3] / "shared/iwslt14/muse_test.tsv.gz"
)
BY_LENGTH = [
    ("1-15", 3424, 38.34),
    ("16-30", 2346, 36.43),
    ("31-45", 686, 34.82),
    ("46-60", 215, 34.14),
    ("61-75", 53, 33.83),
    ("76-90", 18, 35.14),
    ("91-105", 6, 39.55),
    (">105", 2, 25.59),
]


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="set LOCALGLOBAL_IWSLT14_MUSE_TEST to the file")
def test_the_official_hypotheses_score_what_the_paper_says():
    with gzip.open(OFFICIAL, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    _, sources, references, hypotheses = zip(*rows, strict=True)
    found = bleu.score(hypotheses, references, sources, tokenized=True)
    assert round(found["bleu"], 2) == 36.28
    assert [round(p, 1) for p in found["precisions"]] == [68.9, 43.8, 29.9, 20.8]
    assert round(found["brevity_penalty"], 3) == 0.980
    assert (found["hypothesis_tokens"], found["reference_tokens"]) == (128_601, 131_161)
    table = [(b["words"], b["sentences"], round(b["bleu"], 2)) for b in found["by_length"]]
    assert table == BY_LENGTH
    report = bleu.report(found)
    assert "36.28  68.9/43.8/29.9/20.8" in report and "0.980, 128,601 tokens for 131,161" in report
