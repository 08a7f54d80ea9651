# SPDX-License-Identifier: Apache-2.0
"""Reads every line of `writings.py` among good ones: files and records -> pairs -> tokens ->
batches, and `localglobal prepare` and `score`."""

import contextlib
import io
import pathlib
from collections.abc import Callable, Iterator

import folders
import numpy as np
import tensorflow_datasets as tfds
import trial
import writings

from localglobal_jax.cli import main
from localglobal_jax.config import schema
from localglobal_jax.data.text import pairs, pipeline
from localglobal_jax.data.tfds import records

Trial = tuple[str, Callable[[], str]]
GOOD = [(f"The house number {i} is green.", f"Das Haus Nummer {i} ist grün.") for i in range(60)]
MIDDLE = 30
RANDOM = 60  # lines of `writings.fuzz`
CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict(dict(model=dict(name="muse"), task=dict(name="translation")))
"""


def trials(scratch: pathlib.Path) -> Iterator[Trial]:
    """Yields (name, function) of every attempt."""
    lines = {**writings.lines(), **dict(writings.fuzz(RANDOM))}
    clean = scratch / "clean"
    built = trial.attempt(lambda: _build(clean))
    assert built.kind == "built", built
    for name, line in lines.items():
        for side in (0, 1):
            where = ("source", "target")[side]
            for form in ("two files", "tsv", "two files, CRLF, mark"):

                def files(line=line, side=side, form=form):
                    return _files(scratch / "dirty", line, side, form)

                yield f"{form}: {where}: {name}", files

            def held(line=line, side=side):
                return _records(scratch, clean, line, side)

            yield f"records: {where}: {name}", held
            yield (
                f"score: {where}: {name}",
                lambda line=line, side=side: _score(scratch, line, side),
            )


def _options(root: pathlib.Path, **more: object) -> schema.Text:
    return schema.Text(vocab=380, max_length=64, buckets=3, rows_multiple=4, **more)


# ------------------------------------------------------------------------------------------ files


def _files(root: pathlib.Path, line: bytes, side: int, form: str) -> str:
    root.mkdir()
    rows = [[part.encode() for part in pair] for pair in GOOD]
    rows[MIDDLE][side] = line
    end, mark = (b"\r\n", b"\xef\xbb\xbf") if "CRLF" in form else (b"\n", b"")
    if form == "tsv":
        names = (str(root / "{split}.tsv"),)
        contents = [b"".join(b"\t".join(row) + end for row in rows)]
    else:
        names = (str(root / "{split}.a"), str(root / "{split}.b"))
        contents = [mark + b"".join(row[i] + end for row in rows) for i in range(2)]
    for name, content in zip(names, contents, strict=True):
        pathlib.Path(name.format(split="train")).write_bytes(content)
    code, said = _prepared(root, names)
    assert "Traceback" not in said, said
    if writings.refused(line):
        bad = pathlib.Path(names[-1 if side else 0].format(split="train"))
        assert code == 2 and f"{bad} is not UTF-8 text: line {MIDDLE + 1} holds" in said, said
        try:
            pairs.read(_options(root, files=names), "train")
        except ValueError as error:
            assert f"line {MIDDLE + 1}" in str(error)
            return "refused"
        raise AssertionError("prepare refused it, training would not")
    assert code == 0, said
    return _batches(_options(root, files=names), line.decode(), side)


def _prepared(root: pathlib.Path, names: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and stderr of `localglobal prepare`."""
    (root / "config.py").write_text(CONFIG)
    given = ",".join(names) + ("," if len(names) == 1 else "")
    command = ["prepare", f"--config={root}/config.py", f"--config.data.files={given}"]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
        code = main.main([*command, "--config.data.eval_splits=train"])
    return code, err.getvalue()


def _batches(options: schema.Text, line: str, side: int) -> str:
    """Returns works or skipped; asserts that all other pairs come back side by side."""
    good = [tuple(pair) for pair in GOOD]
    shown = " ".join(line.split())
    odd = tuple(shown if i == side else GOOD[MIDDLE][i] for i in range(2))
    wanted = [*good[:MIDDLE], *([odd] if shown else []), *good[MIDDLE + 1 :]]
    found = pairs.read(options, options.train_split)
    assert list(zip(found.sources, found.targets, strict=True)) == wanted
    if not shown:
        assert found.counts["left out: a side is empty"] == 1
    source = pipeline.open_train(options)
    again = pipeline.open_train(options, source.tokenizers)
    stream = dict(tokens=2048, multiple=4, seed=3, start=0, stop=12)
    batches = list(pipeline.train_batches(source, **stream))
    for batch, other in zip(batches, pipeline.train_batches(again, **stream), strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key], strict=True)
    for split in (found.sources, found.targets):  # what has no character of its own is kept too
        words = source.tokenizers.source
        for sentence, ids in zip(split, words.encode(split), strict=True):
            assert words.decode(ids) == sentence.replace("\u2581", " ").strip() or "\u2581" in line
    read = set(wanted)
    for batch in batches:
        for row, of in zip(batch["source"], batch["target"], strict=True):
            pair = tuple(source.tokenizers.source.decode(ids.tolist()) for ids in (row, of))
            assert pair in read or "\u2581" in line, pair
    return "works" if shown else "skipped"


# ---------------------------------------------------------------------------------------- records


def _build(root: pathlib.Path) -> str:
    features = {"a": tfds.features.Text(), "b": tfds.features.Text()}
    folder = folders.build(root, "pairs", features, [{"a": a, "b": b} for a, b in GOOD])
    folders.write(folder, "pairs", [_record(pair) for pair in GOOD])
    return "built"


def _record(pair: tuple[str | bytes, ...]) -> bytes:
    encoded = [part if isinstance(part, bytes) else part.encode() for part in pair]
    return folders.serialized(dict(zip("ab", encoded, strict=True)))


def _records(scratch: pathlib.Path, clean: pathlib.Path, line: bytes, side: int) -> str:
    contents = [_record(pair) for pair in GOOD]
    contents[MIDDLE] = _record(tuple(line if i == side else GOOD[MIDDLE][i] for i in range(2)))
    root = scratch / "dirty"
    folders.copied(clean / "pairs" / "1.0.0", root, contents)
    options = _options(root, name="pairs", dir=str(root), source="a", target="b")
    try:
        line.decode()
    except UnicodeDecodeError:
        try:
            pairs.read(options, "train")
        except records.BadRecord as error:
            assert f"record {MIDDLE} of pairs" in str(error), error
        else:
            raise AssertionError("invalid UTF-8 was read") from None
        found = pairs.read(options.model_copy(update={"max_bad_records": 1}), "train")
        assert found.counts["left out: unreadable record"] == 1
        wanted = [*GOOD[:MIDDLE], *GOOD[MIDDLE + 1 :]]
        assert list(zip(found.sources, found.targets, strict=True)) == wanted
        return "skipped"
    return _batches(options, line.decode(), side)


# ------------------------------------------------------------------------------------------ score


def _score(scratch: pathlib.Path, line: bytes, side: int) -> str:
    root = scratch / "dirty"
    root.mkdir()
    rows = [[part.encode() for part in (b, b)] for _, b in GOOD]
    rows[MIDDLE][side] = line
    for i, name in enumerate(("hyp", "ref")):
        (root / name).write_bytes(b"".join(row[i] + b"\n" for row in rows))
    command = ["score", f"{root}/hyp", f"{root}/ref", f"--source={root}/hyp"]
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main.main(command)
    bad = root / ("hyp", "ref")[side]
    assert "Traceback" not in err.getvalue()
    if writings.refused(line):
        assert code == 2 and f"{bad} is not UTF-8 text: line {MIDDLE + 1} " in err.getvalue()
        return "refused"
    assert code == 0, err.getvalue()
    return "works"
