# SPDX-License-Identifier: Apache-2.0
import gzip

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localglobal_jax.data.text.files import SPLITS, read_lines, read_pairs, split_of

SOME = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), max_size=20)


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@SOME
@given(lines=st.lists(LINE.filter(lambda x: not x.endswith("\r")), min_size=1), end=st.booleans())
def test_lines_come_back(tmp_path, lines, end):
    """Whatever Unicode calls a line break, U+2028 or a form feed, stays inside its line."""
    if lines[0].startswith("\ufeff"):
        return
    if lines[-1] == "" or "\r" in lines[0]:
        end = True
    for bom in (b"", b"\xef\xbb\xbf"):
        for newline in ("\n", "\r\n"):
            text = newline.join(lines) + (newline if end else "")
            assert read_lines(put(tmp_path / "f", bom + text.encode())) == lines


def test_files_of_carriage_returns_have_lines(tmp_path):
    assert read_lines(put(tmp_path / "f", b"a b\rc\r\rd")) == ["a b", "c", "", "d"]
    assert read_lines(put(tmp_path / "f", b"a\rb\n")) == ["a\rb"]  # a line feed: inside a line


@SOME
@given(data=st.binary(max_size=60))
def test_any_bytes_are_lines_or_an_error_with_a_line_number(tmp_path, data):
    path = put(tmp_path / "f", data)
    try:
        lines = read_lines(path)
    except ValueError as error:
        assert f"{path} is not UTF-8 text: line " in str(error)
    else:
        content = data.removeprefix(b"\xef\xbb\xbf")
        content = content if b"\n" in content else content.replace(b"\r", b"\n")
        assert len(lines) == content.count(b"\n") + bool(content) - content.endswith(b"\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\xfcr\n", "line 2 .*0xfc"),
        (b"\xef\xbb\xbfa\nb\n\xfc", "line 3 .*0xfc"),
        ("a\nb".encode("utf-16"), "line 1 "),
        (b"a\n\nx\0y\xff", "line 3 .*NUL"),
        (b"a\xff\nx\0y", "line 1 .*0xff"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=f"{message}.*iconv"):
        read_lines(put(tmp_path / "f", data))


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_lines(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_lines(tmp_path)


@SOME
@given(lines=st.lists(st.tuples(LINE, LINE), min_size=1, max_size=30))
def test_every_pair_is_in_one_split_whatever_the_form(tmp_path, lines):
    lines = [tuple(part.replace("\t", " ").rstrip("\r\ufeff") for part in line) for line in lines]
    if any(part.startswith("\ufeff") for line in lines for part in line):
        return
    two = tuple(put(tmp_path / f"{i}", "".join(f"{line[i]}\n" for line in lines)) for i in range(2))
    one = (put(tmp_path / "t.tsv", "".join(f"{a}\t{b}\n" for a, b in lines)),)
    parts = {split: read_pairs(two, split) for split in SPLITS}
    assert parts == {split: read_pairs(one, split) for split in SPLITS}
    together = [pair for part in parts.values() for pair in zip(*part, strict=True)]
    assert sorted(together) == sorted(lines)
    for split, (sources, _) in parts.items():
        assert all(split_of(source) == split for source in sources)


def test_a_twentieth_each_is_held_out():
    found = [split_of(f"sentence {i}") for i in range(10_000)]
    assert {split: round(found.count(split) / 500) for split in SPLITS} == {
        "train": 18,
        "validation": 1,
        "test": 1,
    }


def test_files_per_split(tmp_path):
    for split in ("train", "dev"):
        put(tmp_path / f"{split}.de", f"{split} eins\n")
        put(tmp_path / f"{split}.en", f"{split} one\n")
    files = (str(tmp_path / "{split}.de"), str(tmp_path / "{split}.en"))
    assert read_pairs(files, "dev") == (["dev eins"], ["dev one"])
    with pytest.raises(ValueError, match=r"test\.de"):
        read_pairs(files, "test")
    with pytest.raises(ValueError, match=r"data\.files"):
        read_pairs((files[0], str(tmp_path / "train.en")), "train")


def test_files_that_do_not_fit(tmp_path):
    a, b = put(tmp_path / "a", "1\n2\n3\n"), put(tmp_path / "b", "1\n2")
    with pytest.raises(ValueError, match=r"a .*3 .*b .*2"):
        read_pairs((a, b), "train")
    with pytest.raises(ValueError, match=r'"tset".*"test"'):
        read_pairs((a, a), "tset")
    tsv = put(tmp_path / "t.tsv", "a\tb\nc\nd\te\n")
    with pytest.raises(ValueError, match=r"line 2 of .*t\.tsv"):
        read_pairs((tsv,), "train")


def test_a_compressed_file_is_said_to_be_one(tmp_path):
    (tmp_path / "a.tsv").write_bytes(gzip.compress(b"a\tb\n"))
    with pytest.raises(ValueError, match="gzip"):
        read_lines(tmp_path / "a.tsv")
