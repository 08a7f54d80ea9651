# SPDX-License-Identifier: Apache-2.0
"""`localglobal score`: BLEU, its signature, and files that do not fit each other."""

import json

import pytest

from localglobal_jax.cli.main import main


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
