# SPDX-License-Identifier: Apache-2.0
"""Pairs of sentences as strings: from a prepared TFDS set, from text files, or mock pairs.

Whitespace is squeezed: a sentence is a line, its words parted by single blanks. A pair with an
empty side is left out and counted.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from localglobal_jax.config import schema
from localglobal_jax.config.validation import unknown
from localglobal_jax.data.text import files
from localglobal_jax.data.tfds import records

BLOCK = 4096  # records read at a time
MOCK_PAIRS = {"train": 4096}
MOCK_HELD_OUT = 256
MOCK_WORDS, MOCK_LENGTH = 60, 24  # at most


class Pairs(NamedTuple):
    """Sentence i of ``sources`` means sentence i of ``targets``."""

    sources: list[str]
    targets: list[str]
    counts: dict[str, int]  # "read", then what was left out and why

    def where(self, kept: np.ndarray) -> "Pairs":
        """Returns the pairs where ``kept: bool [n]``, with the same counts."""
        chosen = np.flatnonzero(kept).tolist()
        sources, targets = ([side[i] for i in chosen] for side in (self.sources, self.targets))
        return Pairs(sources, targets, self.counts)


def read(options: schema.Text, split: str) -> Pairs:
    """Returns the pairs of a split. Raises ValueError for data that is missing or damaged."""
    if options.mock:
        return _filtered(*mock_language(options, split))
    if options.files:
        found = _filtered(*files.read_pairs(options.files, split))
        if not found.sources:
            raise ValueError(
                f"data.files={options.files} holds no pair of the split {split}: give a file per "
                'split, with "{split}" in their names; one alone is parted by its sources, a pair '
                f"in {files.EVERY} to each of validation and test"
            )
        return found
    return _from_records(options, split)


def count(options: schema.Text) -> dict[str, int]:
    """Counts the pairs of every split that `options` name, and of all splits of text files.

    Returns split -> pairs, and what was left out of them.
    """
    counts: dict[str, int] = {}
    named = (options.train_split, *options.eval_splits)
    parted = options.files and not any("{split}" in file for file in options.files)
    for split in named:
        counts |= _counted(read(options, split), split)
    if parted:
        for split in sorted({*files.SPLITS} - {*named}):
            with contextlib.suppress(ValueError):  # nobody asked for it: it may be empty
                counts |= _counted(read(options, split), split)
    return counts


def _counted(pairs: Pairs, split: str) -> dict[str, int]:
    left_out = {key: n for key, n in pairs.counts.items() if n and key != "read"}
    return {split: len(pairs.sources), **{f"{split}, {key}": n for key, n in left_out.items()}}


def _filtered(sources: Iterable[str], targets: Iterable[str]) -> Pairs:
    squeezed = [
        (" ".join(source.split()), " ".join(target.split()))
        for source, target in zip(sources, targets, strict=True)
    ]
    kept = [pair for pair in squeezed if all(pair)]
    counts = {"read": len(squeezed), "left out: a side is empty": len(squeezed) - len(kept)}
    return Pairs([pair[0] for pair in kept], [pair[1] for pair in kept], counts)


# ------------------------------------------------------------------------------------------ TFDS


def _from_records(options: schema.Text, split: str) -> Pairs:
    builder = records.find_builder(options.name, records.data_root(options.dir))
    keys = languages(builder.info, options.source, options.target)
    source = records.Records(builder, split)
    tolerance = records.BadRecordBudget(options.max_bad_records)
    texts: tuple[list[str], list[str]] = ([], [])
    for start in range(0, len(source), BLOCK):
        numbers = range(start, min(start + BLOCK, len(source)))
        for number, record in zip(numbers, source.block(numbers), strict=True):
            try:
                if isinstance(record, records.BadRecord):
                    raise record
                pair = [_text(record[key]) for key in keys]
            except (ValueError, LookupError, TypeError) as error:
                bad = error if isinstance(error, records.BadRecord) else source.bad(number, error)
                tolerance.admit(number, bad)
            else:
                for side, text in zip(texts, pair, strict=True):
                    side.append(text)
    pairs = _filtered(*texts)
    unreadable = {"left out: unreadable record": len(tolerance.seen)}
    return pairs._replace(counts={**pairs.counts, "read": len(source), **unreadable})


def target_language(options: schema.Text) -> str | None:
    """Returns the language that `options` translate into, such as "de"; None if not known."""
    if options.mock:
        return None
    if options.files:  # the end of a name: train.zh, train.zh-en.zh, {split}.en-zh.zh
        end = pathlib.PurePath(options.files[-1]).suffix.removeprefix(".")
        return options.target or (end if len(options.files) == 2 else None)
    builder = records.find_builder(options.name, records.data_root(options.dir))
    return languages(builder.info, options.source, options.target)[1]


def _text(value: Any) -> str:
    if isinstance(value, str | bytes):  # TFDS's mock data comes as str
        return value if isinstance(value, str) else value.decode("utf-8")
    raise TypeError(f"want text, found {type(value).__name__}")


def languages(
    info: tfds.core.DatasetInfo, source: str | None = None, target: str | None = None
) -> tuple[str, str]:
    """Returns the text features to translate from and to; by default the data set's own."""
    known = [key for key, kind in info.features.items() if isinstance(kind, tfds.features.Text)]
    for given in (source, target):
        if given is not None and given not in known:
            raise unknown(f"language of {info.full_name}:", given, known)
    default = [key for key in info.supervised_keys or known if key in known]
    source = source or next((key for key in default if key != target), None)
    target = target or next((key for key in reversed(default) if key != source), None)
    if source is None or target is None or source == target:
        raise ValueError(
            f"{info.full_name} does not give two languages for data.source={source} and "
            f"data.target={target}: it has the texts {', '.join(known) or 'none'}"
        )
    return source, target


# ------------------------------------------------------------------------------------------ mock


def mock_words(options: schema.Text) -> list[str]:
    """Returns the mock vocabulary of both sides, as many words as the options allow."""
    return [f"w{i}" for i in range(options.vocab - 4)]


def mock_language(options: schema.Text, split: str) -> tuple[list[str], list[str]]:
    """Returns pairs of a mock language: each word has one translation, the order is reversed."""
    words = mock_words(options)[:MOCK_WORDS]
    meaning = np.random.default_rng(0).permutation(len(words))
    stream = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big")
    rng = np.random.default_rng([1, stream])
    longest = min(MOCK_LENGTH, options.max_length - 1)
    sources, targets = [], []
    for _ in range(MOCK_PAIRS.get(split, MOCK_HELD_OUT)):
        sentence = rng.integers(len(words), size=rng.integers(1, longest + 1))
        sources.append(" ".join(words[i] for i in sentence))
        targets.append(" ".join(words[i] for i in meaning[sentence][::-1]))
    return sources, targets
