# SPDX-License-Identifier: Apache-2.0
"""Plain text files of sentence pairs: one file per language, or a table of two columns.

Another encoding, sides of unequal length and a wrong number of columns are errors that name the
line: going on would shift or garble pairs.
"""

import hashlib
import pathlib
from collections.abc import Sequence

from localglobal_jax.config.validation import unknown
from localglobal_jax.data.tfds import gcs

SPLITS = ("train", "validation", "test")
EVERY = 20  # one pair in so many is for testing, one for validation


def read_lines(path: str | pathlib.Path) -> list[str]:
    """Returns the `lines` of a file."""
    file = gcs.place(path).expanduser()
    try:
        with gcs.named_in_errors(file):
            data = file.read_bytes()
    except OSError as error:
        if gcs.is_bucket(file) and gcs.may_pass(error):
            raise
        raise ValueError(f"cannot read {path}: {error.strerror or 'it is missing'}") from error
    return lines(data, str(path))


def lines(data: bytes, name: str, *, first: int = 1) -> list[str]:
    """Returns the lines of UTF-8 text, without line ends and byte order mark.

    Only line feeds end a line: other characters that Unicode calls line breaks occur inside
    sentences of web corpora. Without any line feed, carriage returns do. Raises ValueError for
    other text, with the number of its first bad line. The first of all is number `first`; only
    number 1 has a mark.
    """
    bad, why = data.find(b"\0"), "a NUL byte"
    marked = first == 1 and data.startswith(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8-sig" if marked else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start + 3 * marked  # counted without the mark
        if bad < 0 or at < bad:
            bad, why = at, f"the byte 0x{data[at]:02x}"
    if data.startswith(b"\x1f\x8b"):
        raise ValueError(
            f"{name} is not UTF-8 text: line {first} begins as a file of gzip: unpack it (gzip -d)"
        )
    if bad >= 0:
        raise ValueError(
            f"{name} is not UTF-8 text: line {data[:bad].count(10) + first} holds {why}. "
            "Convert it, for instance with `iconv -f latin1 -t utf-8` (or utf-16, gb18030, "
            "shift_jis instead of latin1)"
        )
    found = text.split("\n" if "\n" in text else "\r")
    if found[-1] == "":
        found.pop()
    return [line.removesuffix("\r") for line in found]


def split_of(source: str) -> str:
    """Returns the split of a pair, a function of its source, so that repeats stay together."""
    words = " ".join(source.split()).encode()  # blanks do not make another sentence
    number = int.from_bytes(hashlib.sha256(words).digest()[:8], "big") % EVERY
    return {0: "test", 1: "validation"}.get(number, "train")


def read_pairs(files: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """Returns sources and targets of a split, from two files or one of ``source TAB target``.

    With ``{split}`` in their names each split has files of its own, else see `split_of`.
    """
    per_split = ["{split}" in file for file in files]
    if any(per_split) != all(per_split):
        raise ValueError(
            f'data.files={files}: either both have "{{split}}" in their names, or none'
        )
    if not all(per_split) and split not in SPLITS:
        raise unknown("split of data.files:", split, SPLITS)
    sources, targets = _columns([file.replace("{split}", split) for file in files])
    if all(per_split):
        return sources, targets
    chosen = [i for i, source in enumerate(sources) if split_of(source) == split]
    return [sources[i] for i in chosen], [targets[i] for i in chosen]


def _columns(files: Sequence[str]) -> tuple[list[str], list[str]]:
    sides = [read_lines(file) for file in files]
    if len(sides) == 2:
        sources, targets = sides
        if len(sources) != len(targets):
            raise ValueError(
                f"{files[0]} has {len(sources)} lines, {files[1]} has {len(targets)}: line i of "
                "one has to translate line i of the other"
            )
        return sources, targets
    rows = [line.split("\t") for line in sides[0]]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(
                f"line {number} of {files[0]} has {len(row)} columns: want two, source TAB target "
                "(or two files, of sources and of targets)"
            )
    return [row[0] for row in rows], [row[1] for row in rows]
