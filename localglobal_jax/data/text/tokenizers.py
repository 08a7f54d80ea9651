# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: SentencePiece trained on the data, or fairseq's dictionaries.

The special ids are fairseq's, so that official checkpoints and our own agree on them.
"""

import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import sentencepiece

from localglobal_jax.checkpoints.workdir import shown
from localglobal_jax.config import schema
from localglobal_jax.data.tfds import gcs

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = 4  # ids below this one
TRAINING_LINES = 2_000_000  # beyond, evenly spaced lines: a vocabulary hardly changes any more
DIRECTORY = "tokenizer"  # in a workdir
INDEX = "tokenizer.json"  # written last: a directory that has it is whole


class Tokenizer(Protocol):
    """One language, or two that share a vocabulary. Ids are without the special ones."""

    size: int  # ids, special ones included
    tokenized: bool  # text is words parted by blanks, not what people write

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def plain(self, text: str) -> str:
        """Returns the text without marks of subwords, as `decode` does."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text before the first EOS, without padding and BOS."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns every id's entry in the vocabulary, special ids too."""

    def join(self, pieces: Sequence[str]) -> str:
        """Returns the text of pieces, none of them special; others than the vocabulary's stay."""

    def dump(self) -> bytes:
        """Returns the contents of the file that restores the tokenizer."""


def content(ids: Iterable[int]) -> list[int]:
    """Returns the ids before the first EOS that are not padding or BOS."""
    found = []
    for i in map(int, ids):
        if i == EOS:
            break
        if i not in (BOS, PAD):
            found.append(i)
    return found


# --------------------------------------------------------------------------------- SentencePiece


class SentencePiece:
    """A SentencePiece model. Decoding restores the text, except repeated blanks."""

    tokenized = False

    def __init__(self, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"this is no SentencePiece model: {error}") from error
        p = self._processor
        if (p.bos_id(), p.pad_id(), p.eos_id(), p.unk_id()) != (BOS, PAD, EOS, UNK):
            raise ValueError(
                "this SentencePiece model has other special ids: train it with bos_id=0, pad_id=1, "
                "eos_id=2, unk_id=3"
            )
        self._model = model
        self.size = p.get_piece_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(content(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def join(self, pieces: Sequence[str]) -> str:
        text = self._processor.decode_pieces(list(pieces))
        return text.replace("\u2581", " ").strip()  # its sign of a blank, kept in unknown pieces

    def plain(self, text: str) -> str:
        return text

    def dump(self) -> bytes:
        return self._model


def train_sentencepiece(texts: Sequence[str], vocab: int, kind: str) -> SentencePiece:
    """Trains a vocabulary of ``vocab`` ids (``"bpe"`` or ``"unigram"``), deterministic.

    Nothing is normalised, and characters that were never seen become bytes: every text can be
    encoded, and comes back, but for U+2581, SentencePiece's own sign of a blank.
    """
    model = io.BytesIO()
    every = -(-len(texts) // TRAINING_LINES)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[:: every or 1]),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            normalization_rule_name="identity",
            byte_fallback=True,
            max_sentence_length=2**24,  # bytes; longer ones it would skip without a word
            num_threads=1,  # sums in one order
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^.*?\.cc\(\d+\)\s*(\[.*?\])?\s*", "", str(error)) or str(error)
        larger = (
            "Use a larger data.vocab: 256 of the ids are bytes, 4 are special, and every character"
        )
        larger += " has one."
        reason = re.sub(r"Increase vocab_size.*", larger, reason)
        raise ValueError(
            f"cannot make data.vocab={vocab} subwords ({kind}) of {len(texts)} lines: {reason}"
        ) from error
    return SentencePiece(model.getvalue())


# -------------------------------------------------------------------------------------- fairseq


class Dictionary:
    """Words with ids in the order of fairseq's ``dict.txt``: lines of ``word count``.

    Text must be in the form the checkpoint was trained on: tokenised, and split into subwords
    with ``@@`` at the end of every piece that another one follows. Decoding joins them.
    """

    tokenized = True

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words, SPECIAL)}
        if len(self._ids) != len(self.words):
            seen: set[str] = set()
            again = next(w for w in self.words if w in seen or seen.add(w))  # type: ignore[func-returns-value]
            raise ValueError(f'the dictionary has the word "{again}" twice')
        self.size = SPECIAL + len(self.words)

    @classmethod
    def parse(cls, text: str) -> "Dictionary":
        """Parses a ``dict.txt``. Raises ValueError with the number of an invalid line."""
        words = []
        lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            word, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
            if not word or not count.isdecimal():
                raise ValueError(f'line {number} of the dictionary is no "word count": {line!r}')
            words.append(word)
        return cls(words)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._ids.get(word, UNK) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.plain(" ".join(self.pieces(content(ids))))

    def plain(self, text: str) -> str:
        return f"{text} ".replace("@@ ", "").rstrip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        special = ("<s>", "<pad>", "</s>", "<unk>")
        return [special[i] if i < SPECIAL else self.words[i - SPECIAL] for i in ids]

    def join(self, pieces: Sequence[str]) -> str:
        return self.plain(" ".join(pieces))

    def dump(self) -> bytes:
        return "".join(f"{word} 1\n" for word in self.words).encode()


# ------------------------------------------------------------------------------------ both sides


class Tokenizers(NamedTuple):
    """The tokenizers of both languages; one object twice if they share their vocabulary."""

    source: Tokenizer
    target: Tokenizer

    @property
    def joint(self) -> bool:
        return self.source is self.target

    @property
    def same(self) -> bool:
        """Returns whether source and target share one vocabulary."""
        return self.joint or self.source.dump() == self.target.dump()


def create(options: schema.Text, sources: Sequence[str], targets: Sequence[str]) -> Tokenizers:
    """Creates the tokenizers of `options`; subwords are trained on the sentences."""
    if options.tokenizer == "dict":
        return of_dictionaries(options.dicts)
    if options.joint:
        joint = train_sentencepiece([*sources, *targets], options.vocab, options.tokenizer)
        return Tokenizers(joint, joint)
    sides = (train_sentencepiece(t, options.vocab, options.tokenizer) for t in (sources, targets))
    return Tokenizers(*sides)


def of_dictionaries(files: Sequence[str | pathlib.Path], option: str = "data.dicts") -> Tokenizers:
    """Reads fairseq's ``dict.txt`` files: one for both languages, or source and target.

    `option` names them in errors.
    """
    sides = []
    for file in files:
        try:
            text = gcs.place(str(file)).expanduser().read_bytes().decode()
            sides.append(Dictionary.parse(text.replace("\r\n", "\n").replace("\r", "\n")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{option}: cannot read {file}: {error}") from error
    return Tokenizers(sides[0], sides[-1])


FORMATS: dict[str, Callable[[bytes], Tokenizer]] = {
    "sentencepiece": SentencePiece,
    "dict": lambda data: Dictionary.parse(data.decode()),
}


def save(tokenizers: Tokenizers, directory: str | pathlib.Path) -> None:
    """Writes both to ``directory``, each file in one rename, so that no partial file is left."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kind = "sentencepiece" if isinstance(tokenizers.source, SentencePiece) else "dict"
    sides = {"joint": tokenizers.source} if tokenizers.joint else tokenizers._asdict()
    files = {name: f"{name}.{'model' if kind == 'sentencepiece' else 'txt'}" for name in sides}
    contents = {files[name]: side.dump() for name, side in sides.items()}
    checksums = {file: zlib.crc32(data) for file, data in contents.items()}
    index = {"format": kind, "files": files, "crc32": checksums}
    contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    for name, data in contents.items():
        partial = directory / f".{name}.partial"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / name)


def load(directory: str | pathlib.Path) -> Tokenizers | None:
    """Loads the files of `save`; None if there are none. Raises ValueError if they are damaged."""
    directory = pathlib.Path(directory)
    if not (directory / INDEX).is_file():
        return None
    try:
        index = json.loads((directory / INDEX).read_text())
        make, sides = FORMATS[index["format"]], {}
        for name, file in index["files"].items():
            data = (directory / pathlib.PurePath(file).name).read_bytes()  # of this directory
            # A flipped bit in a model is another vocabulary, which nothing else would notice.
            if zlib.crc32(data) != index.get("crc32", {}).get(file, zlib.crc32(data)):
                raise ValueError(f"{file} has changed")
            sides[name] = make(data)
        if "joint" in sides:
            return Tokenizers(sides["joint"], sides["joint"])
        return Tokenizers(sides["source"], sides["target"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the tokenizer in {shown(directory)} is damaged ({error!r}): restore it; training a "
            "new one would change the meaning of every id"
        ) from error
