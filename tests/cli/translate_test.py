# SPDX-License-Identifier: Apache-2.0
"""The command: what goes in, what comes out, byte by byte. One real process, with a terminal."""

import functools
import io
import json
import os
import pathlib
import pty
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.convert import files
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import translator

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LINES = ["w27 w17 w38 w6 w36", "", "w9 \u2028 w5", "w4"]
SHORT = "--max_length=6"


def convert(directory, name, words):
    """A checkpoint of fairseq, ready to translate."""
    arguments = json.loads((GOLDEN / f"{name}.json").read_text())["args"]
    (directory / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    files.convert_file(
        "fairseq",
        str(GOLDEN / f"{name}.safetensors"),
        str(directory / "out"),
        arguments=arguments,
        dictionaries=[str(directory / "dict.txt")],
    )
    return directory / "out"


WORDS = [f"w{i}" for i in range(4, 40)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("converted"), "muse_simple_post", WORDS)


@pytest.fixture(scope="module")
def expected(converted):
    return translator.load(converted).translate(LINES, nbest=2, max_length=6)


@pytest.fixture
def run(converted, monkeypatch, capsys):
    """(bytes on stdin, *options) -> (exit code, stdout, stderr)."""

    def run(given, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        code = main(["translate", f"--workdir={converted}", *options])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("separator", ["\n", "\r\n"])
def test_a_line_out_for_a_line_in(run, expected, tmp_path, separator, end):
    given = (separator.join(LINES) + end).encode()
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + given)
    wanted = "".join(f"{found.text}\n" for found in expected)
    assert wanted.count("\n") == len(LINES) and "\n\n" in wanted
    assert run(given, SHORT) == (0, wanted, "")
    assert run(b"", SHORT, str(tmp_path / "in")) == (0, wanted, "")
    assert run(given, SHORT, "-") == (0, wanted, "")


def test_carriage_returns_alone_end_lines_of_stdin_as_of_a_file(run, tmp_path):
    given = b"w4 w5\rw6\rw7"
    (tmp_path / "in").write_bytes(given)
    code, out, _ = run(given, SHORT)
    assert code == 0 and out.count("\n") == 3
    assert run(b"", SHORT, str(tmp_path / "in"))[1] == out


def test_a_closed_stdin_is_named(converted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["translate", f"--workdir={converted}"]) == 2
    assert "FILE" in capsys.readouterr().err


def test_an_export_of_converted_weights_translates(run, converted, expected, tmp_path):
    out = tmp_path / "exported"
    assert main(["export", str(converted), "--format=safetensors", f"--out={out}"]) == 0
    wanted = "".join(f"{found.text}\n" for found in expected)
    code, found, _ = run("\n".join(LINES).encode(), SHORT, f"--workdir={out}")
    assert code == 0 and found.endswith(wanted)


def test_no_line_and_empty_lines(run):
    assert run(b"") == (0, "", "")
    assert run(b"\n\n \n") == (0, "\n\n\n", "")
    assert run(b"\n", "--scores") == (0, "\t\n", "")
    assert run(b"\n", "--nbest=2") == (0, "1\t\t\n", "")


def test_scores_and_the_best(run, expected):
    given = "\n".join(LINES).encode()
    shown = [(f"{t.hypotheses[0].score:.4f}" if t.text else "") + "\t" + t.text for t in expected]
    assert run(given, SHORT, "--scores") == (0, "\n".join(shown) + "\n", "")
    code, out, _ = run(given, SHORT, "--nbest=2")
    rows = [row.split("\t") for row in out.removesuffix("\n").split("\n")]
    assert code == 0 and [row[0] for row in rows] == ["1", "1", "2", "3", "3", "4", "4"]
    texts = [h.text for t in expected for h in t.hypotheses or (t,)]
    assert [row[2] for row in rows] == texts


def test_json_says_everything(run, expected):
    code, out, _ = run("\n".join(LINES).encode(), SHORT, "--nbest=2", "--json")
    found = json.loads(out)["translations"]
    assert code == 0 and [t["line"] for t in found] == [1, 2, 3, 4]
    assert [t["source_tokens"] for t in found] == [6, 0, 3, 2]
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["text"] for h in ours["hypotheses"]] == [h.text for h in theirs.hypotheses]
        for hypothesis in ours["hypotheses"]:
            assert len(hypothesis["pieces"]) == len(hypothesis["token_scores"])
            assert hypothesis["pieces"][-1] == "</s>"


def test_bfloat16_keeps_the_scores_to_its_digits(run, expected):
    code, out, _ = run("\n".join(LINES).encode(), SHORT, "--dtype=bfloat16", "--json")
    found = json.loads(out)["translations"]
    ours = [h["score"] for t in found for h in t["hypotheses"]]
    theirs = [t.hypotheses[0].score for t in expected if t.hypotheses]
    assert code == 0 and ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=2**-6)


def test_lines_that_are_too_long(run, expected):
    code, out, error = run("\n".join(LINES).encode(), SHORT, "--max_source=3")
    assert code == 2
    assert out == "".join(f"{t.text if 0 < t.tokens <= 3 else ''}\n" for t in expected)
    assert error == (
        "localglobal translate: line 1: 6 tokens, but at most 3 are translated (max_source)\n"
    )


def test_blocks_of_lines_are_numbered_on(run, expected, monkeypatch):
    from localglobal_jax.cli import translate as translate_command

    monkeypatch.setattr(translate_command, "BLOCK", 3)
    code, out, error = run("\n".join([*LINES, LINES[0]]).encode(), SHORT, "--max_source=5")
    assert code == 2 and "line 1:" in error and "line 5:" in error
    assert out.split("\n") == ["", "", expected[2].text, expected[3].text, "", ""]
    drawn = [run(b"w4\nw4\nw5\nw4\n", SHORT, "--sample", "--seed=3")[1]]
    monkeypatch.setattr(translate_command, "BLOCK", 1024)
    drawn.append(run(b"w4\nw4\nw5\nw4\n", SHORT, "--sample", "--seed=3")[1])
    assert drawn[0] == drawn[1] and drawn[0].count("\n") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=2"], "--temperature"),
        (["--sample", "--beam=3"], "--beam"),
        (["--nbest=9"], "nbest=9, beam=4"),
        (["--beam=0"], "beam=0"),
        (["--beam=100000"], "beam=100000"),  # there was no answer
        (["--wait=-1"], "--wait"),
        (["--step=7"], "step 7"),
        (["--attention=x.jpg"], "x.jpg"),
        (["nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_options(run, options, message):
    code, out, error = run(b"w4\n", *options)
    assert (code, out) == (2, "") and message in error


def test_what_is_no_text_is_refused_before_anything_is_translated(run):
    code, out, error = run(b"w4\n\xff\n")
    assert (code, out) == (2, "")
    assert "line 2" in error and "0xff" in error


def start(converted, *options, **streams):
    command = [sys.executable, "-m", "localglobal_jax", "translate", f"--workdir={converted}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, SHORT, *options], **{**pipes, **streams})


def test_a_pipe_that_stays_open_gets_its_answers(converted, expected):
    """marian-dev#274, sockeye#175: nothing came before stdin was closed."""
    with start(converted, "--wait=0.1") as process:
        process.stdin.write(f"\ufeff{LINES[0]}\n".encode())
        process.stdin.flush()
        assert process.stdout.readline().decode() == f"{expected[0].text}\n"
        process.stdin.write(f"{LINES[1]}\n{LINES[2]}\n{LINES[3][:1]}".encode())
        process.stdin.flush()
        assert [process.stdout.readline().decode() for _ in range(2)] == [
            f"{found.text}\n" for found in expected[1:3]
        ]
        process.stdin.write(f"{LINES[3][1:]}\n\xff".encode("latin1"))
        out, error = process.communicate(timeout=600)
    assert out.decode() == "" and process.returncode == 2  # the block holds the bad line
    assert "line 5" in error.decode() and "0xff" in error.decode()


def test_a_stream_without_an_end_and_a_reader_that_leaves(converted, expected):
    with (
        subprocess.Popen(["yes", LINES[0]], stdout=subprocess.PIPE) as source,
        start(converted, "--batch_size=512", stdin=source.stdout, stderr=None) as process,
    ):
        source.stdout.close()
        assert process.stdout.readline().decode() == f"{expected[0].text}\n"
        process.stdout.close()
        assert process.wait(timeout=600) == 1


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3, 9), tuple(range(40))])
def test_lines_arrive_in_pieces(cuts, monkeypatch):
    from localglobal_jax.cli import translate as translate_command

    monkeypatch.setattr(translate_command, "BLOCK", 2)
    given = "\ufeffä b\r\n\n\ufeffc\nd\ne\r\nno end".encode()
    pieces = [given[a:b] for a, b in zip((0, *cuts), (*cuts, len(given)), strict=True)]
    pieces = iter([piece for piece in pieces if piece])
    source = (lambda seconds: True, lambda: next(pieces, b""))
    monkeypatch.setattr(translate_command, "_input", lambda: source)
    found = list(translate_command._arriving(0.5))
    assert [line for block in found for line in block] == [
        *("ä b", "", "\ufeffc", "d", "e", "no end")
    ]
    assert max(map(len, found)) <= 2


def test_words_the_vocabulary_does_not_have_are_said(run, converted):
    """OpenNMT-py#2139, #2602: raw text gave nonsense, and nothing said why."""
    code, out, error = run(b"Press the button, please.\nw4 w5\n", SHORT)
    assert code == 0 and out.count("\n") == 2
    assert "4 of the first 6 words (67%)" in error and "@@" in error
    assert run(b"w4 w5\n" * 20 + b"w4 new\n", SHORT)[2] == ""  # few
    code, out, _ = run(b"w4 new\n", SHORT, "--json")
    assert json.loads(out)["translations"][0]["unknown_tokens"] == 1


def test_directories_that_do_not_translate(converted, tmp_path, capsys):
    assert main(["translate", f"--workdir={tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    shutil.copytree(converted / "checkpoints", tmp_path / "checkpoints")
    assert main(["translate", f"--workdir={tmp_path}"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    tokenizers.save(
        tokenizers.Tokenizers(*[tokenizers.Dictionary(["a"])] * 2), tmp_path / "tokenizer"
    )
    assert main(["translate", f"--workdir={tmp_path}"]) == 2
    assert "source_vocab=40" in capsys.readouterr().err


def test_a_picture_of_the_first_sentence(run, tmp_path):
    file = tmp_path / "attention.png"
    code, out, _ = run(b"\nw4 w5\nw6\n", SHORT, f"--attention={file}")
    assert code == 0 and out.count("\n") == 3
    assert file.read_bytes().startswith(b"\x89PNG")
    code, _, error = run(b"\n", f"--attention={tmp_path}/none.png")
    assert code == 2 and "--attention" in error
    assert not (tmp_path / "none.png").exists()


def test_a_reader_that_goes_away_is_no_error(run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        code, _, error = run(b"w4\n", SHORT)
    assert (code, error) == (1, "")


def test_people_type_and_see_each_translation_at_once(converted, expected):
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "localglobal_jax", "translate", f"--workdir={converted}", SHORT],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    os.close(theirs)
    try:
        for line, translation in ((LINES[0], expected[0]), ("", expected[1])):
            os.write(terminal, f"{line}\n".encode())
            assert process.stdout.readline().decode() == f"{translation.text}\n"
        os.write(terminal, b"\x04")
        out, error = process.communicate(timeout=600)
    finally:
        process.kill()
        os.close(terminal)
    assert (process.returncode, out) == (0, b"")
    assert error == b"One sentence per line; Ctrl-D ends.\n"


def test_an_ensemble_of_workdirs(run, converted, tmp_path_factory):
    """Two runs of other layers; the score is the mean of their scores, token by token."""
    other = convert(tmp_path_factory.mktemp("other"), "muse_post", WORDS)
    code, out, _ = run(b"w27 w17 w38 w6 w36\nw4\n", f"--workdir={other}", "--json", SHORT)
    assert code == 0
    both = translator.load([converted, other])
    members = [translator.load(path) for path in (converted, other)]
    lines = ["w27 w17 w38 w6 w36", "w4"]
    for found, line in zip(json.loads(out)["translations"], lines, strict=True):
        (shown,) = found["hypotheses"]
        (wanted,) = both.translate([line], max_length=6)
        assert shown["text"] == wanted.text
        scores = np.zeros(len(shown["token_scores"]))
        tokens = np.array(wanted.hypotheses[0].tokens)
        for member in members:
            source = jnp.array(member._encode([line]))
            before = jnp.array([[member.module.start, *tokens[:-1]]])
            apply = jax.jit(functools.partial(member.module.apply, train=False))
            logits, _ = apply(member.variables, source, before)
            log_p = jax.nn.log_softmax(np.asarray(logits[0], np.float64))
            scores += np.asarray(log_p)[np.arange(len(tokens)), tokens] / 2
        np.testing.assert_allclose(shown["token_scores"], scores, atol=1e-4)
    twice = run(b"w4\n", f"--workdir={converted}", SHORT)
    assert twice == run(b"w4\n", SHORT)

    foreign = convert(tmp_path_factory.mktemp("foreign"), "muse_post", WORDS[::-1])
    code, _, err = run(b"w4\n", f"--workdir={foreign}")
    assert code == 2 and str(foreign) in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--beam=1", "--sample"])
def test_an_ensemble_without_a_beam(run, tmp_path_factory, how):
    other = convert(tmp_path_factory.mktemp("other"), "muse_post", WORDS)
    code, out, _ = run(b"w4\n", f"--workdir={other}", how, SHORT)
    assert code == 0 and out.count("\n") == 1
