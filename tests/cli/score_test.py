# SPDX-License-Identifier: Apache-2.0
"""`localglobal score`: BLEU, its signature, and files that do not fit each other."""

import json

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.inference import bleu


def test_score(tmp_path, capsys):
    for name, lines in (("hyp", "a b c d\n"), ("ref", "a b c d\n"), ("src", "x y\n")):
        (tmp_path / name).write_text(lines)
    hyp, ref, src = (str(tmp_path / name) for name in ("hyp", "ref", "src"))
    assert main(["score", hyp, ref, "--source", src, "--tokenized"]) == 0
    out = capsys.readouterr().out
    assert "BLEU  100.00" in out and "tok:none|smooth:none" in out and "1-15" in out
    assert main(["score", hyp, ref, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bleu"] == pytest.approx(100) and "tok:13a" in result["signature"]
    (tmp_path / "ref").write_text("a b c d\ne\n")
    assert main(["score", hyp, ref]) == 2
    assert "1 hypotheses, 2" in capsys.readouterr().err
    (tmp_path / "ref").write_bytes(b"\xff\n")
    assert main(["score", hyp, ref]) == 2
    assert ref in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "language"),
    [("zh", "zh"), ("ZH", "zh"), ("zh_CN", "zh"), ("zh-Hant-TW", "zh"), ("my_test", None),
     ("zh-en", None), ("txt", "txt"), ("", None)],
)  # fmt: skip
def test_language_in_the_name_of_a_file(name, language):
    assert bleu.language_of(name) == language


def test_score_of_text_without_blanks(tmp_path, capsys):
    """sacrebleu#147: 200 Chinese lines, a character in 20 wrong."""
    lines = [chr(0x4E00 + i) + "今天的天气很好我们一起去公园散步吧好吗" for i in range(200)]
    assert {len(line) for line in lines} == {20}
    hyp, ref, named = (str(tmp_path / name) for name in ("hyp", "ref", "ref.zh"))
    for name in (ref, named):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / hyp).write_text("\n".join(f"{line[:10]}錯{line[11:]}" for line in lines) + "\n")
    places = [str(tmp_path / f"ref.{place}") for place in ("zh_CN", "zh-TW")]
    for place in places:
        (tmp_path / place).write_text("\n".join(lines) + "\n")
    for options in ([ref, "--tokenize", "zh"], [named], *([place] for place in places)):
        assert main(["score", hyp, *options]) == 0
        out, err = capsys.readouterr()
        assert "BLEU  85.79" in out and "tok:zh" in out and "warning" not in err
    assert main(["score", hyp, ref]) == 0
    out, err = capsys.readouterr()
    assert "BLEU  0.00" in out and "--tokenize" in err and "zh" in err
    assert main(["score", hyp, ref, "--tokenize", "chinese"]) == 2
    assert '"chinese"' in capsys.readouterr().err
    assert main(["score", hyp, ref, "--tokenize", "zh", "--tokenized"]) == 2


def test_compound_split(tmp_path, capsys):
    """As fairseq's script has it: perl -ple 's{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g'."""
    assert bleu.compound_split(["ein rosa-rotes , x- - y a-b-c", "", "-a b-"]) == [
        *("ein rosa ##AT##-##AT## rotes , x- - y a ##AT##-##AT## b-c", "", "-a b-")
    ]
    assert bleu.compound_split(["aa-bb-cc"]) == ["aa ##AT##-##AT## bb ##AT##-##AT## cc"]
    hyp, ref = (str(tmp_path / name) for name in ("hyp", "ref"))
    (tmp_path / "hyp").write_text("der rosa-rote Kreis ist nun hier\n")
    (tmp_path / "ref").write_text("der rosa-blaue Kreis ist nun hier\n")
    scores = []
    for options in (["--tokenized"], ["--tokenized", "--compound_split"]):
        assert main(["score", hyp, ref, "--json", *options]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert [score["reference_tokens"] for score in scores] == [6, 8]
    # 7 of 8 words; 5 of 7 pairs, 3 of 6 triples, 1 of 5 quadruples
    assert scores[1]["bleu"] == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25)
    assert scores[0]["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert main(["score", hyp, ref, "--compound_split"]) == 2
    assert "--tokenized" in capsys.readouterr().err
