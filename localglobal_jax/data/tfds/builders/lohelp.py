# SPDX-License-Identifier: Apache-2.0
"""LibreOffice Help, English to German or French: about 30,000 exactly aligned paragraphs.

The pages of Debian's ``libreoffice-help-*`` packages (MPL-2.0, a few megabytes) give a paragraph
the same id in every language, so alignment is a look-up. Pages quote each other and headings
repeat, so a source sentence is kept once, in the first page that has it, and whole pages go to
one split. Near duplicates ("Inserts a row." on one page, "Inserts a column." on another) do cross
the splits: scores here flatter, and compare only with each other.

The help's version moves with Debian's updates, and the text with it; ours is that of the cleaning.
"""

import collections
import dataclasses
import hashlib
import html.parser
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

PAIRS = ("en-de", "en-fr")
FOLDERS = {"en": "en-US", "de": "de", "fr": "fr"}  # of a language, below the help's
INSTALLED = pathlib.PurePosixPath("/usr/share/libreoffice/help")

PARAGRAPH = re.compile(r"(par|hd)_")  # how the ids of paragraphs and headings begin
TOKEN = re.compile(r"\w+|[^\w\s]")
TOKENS = (2, 250)  # shorter: a name of a button; longer: a table squeezed into a paragraph
RATIO = 2.5  # of the two lengths
LETTERS = 0.7  # share of what is not space; below: formulas, key combinations
EVERY = 20  # one page in so many is for testing, one for validation


class Pair(NamedTuple):
    """A paragraph, its translation and the page both stand on."""

    page: str
    source: str
    target: str


# ------------------------------------------------------------------------------------ packages


def packages(config: str) -> list[str]:
    """Returns the Debian packages of both languages of a pair such as ``en-de``."""
    return [f"libreoffice-help-{FOLDERS[language].lower()}" for language in config.split("-")]


def locate(directory: str | pathlib.PurePath, config: str) -> list[pathlib.Path]:
    """Returns the folders of both languages' pages of a pair such as ``en-de``."""
    found = [pathlib.Path(directory, FOLDERS[language], "text") for language in config.split("-")]
    if missing := [str(path) for path in found if not any(path.rglob("*.html"))]:
        raise ValueError(
            f"LibreOffice Help has no pages in {' and '.join(missing)}. Install the packages "
            f"{' and '.join(packages(config))}, or unpack them and give their "
            f"{INSTALLED} as --source DIR"
        )
    return found


# ------------------------------------------------------------------------------------- parsing


@dataclasses.dataclass
class Span:
    """An open ``<span>`` of a paragraph: a choice of variants, one of them, or neither."""

    start: int  # pieces of text before it
    choice: bool
    variant: bool
    default: bool
    variants: list[tuple[bool, list[str]]] = dataclasses.field(default_factory=list)


class Page(html.parser.HTMLParser):
    """``paragraphs``: the ``(id, text)`` of a page, whitespace squeezed, in order.

    Where the text depends on the system or the module, the page holds every variant in hidden
    spans; what other readers see is the one called default, or else the first.
    """

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[tuple[str, str]] = []
        self._open: tuple[str, str] | None = None  # (tag, id) of the paragraph we are in
        self._pieces: list[str] = []
        self._spans: list[Span] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        name, kind = named.get("id") or "", named.get("class") or ""
        if self._open is None:
            if PARAGRAPH.match(name):
                self._open, self._pieces, self._spans = (tag, name), [], []
        elif tag == "br":
            self._pieces.append(" ")
        elif tag == "span":
            choosing = any(span.choice for span in self._spans)
            self._spans.append(
                Span(
                    start=len(self._pieces),
                    choice=kind.startswith("switch"),
                    variant=choosing and "hidden" in named,
                    default=name.startswith("default"),
                )
            )

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[0]:
            text = " ".join("".join(self._pieces).split())
            self.paragraphs.append((self._open[1], text))
            self._open = None
        elif self._open and tag == "span" and self._spans:
            span = self._spans.pop()
            if span.variant:
                choice = next(around for around in reversed(self._spans) if around.choice)
                choice.variants.append((span.default, self._pieces[span.start :]))
                del self._pieces[span.start :]
            elif span.variants:
                self._pieces += max(span.variants, key=lambda variant: variant[0])[1]

    def handle_data(self, data: str) -> None:
        if self._open:
            self._pieces.append(data)


def paragraphs(path: pathlib.Path) -> dict[str, list[str]]:
    """Returns id -> its texts (a page may quote a paragraph twice), in order."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    found: dict[str, list[str]] = {}
    for name, paragraph in Page(text).paragraphs:
        found.setdefault(name, []).append(paragraph)
    return found


# --------------------------------------------------------------------------- aligned and cleaned


def align(sources: pathlib.Path, targets: pathlib.Path) -> Iterator[Pair]:
    """Returns all paragraphs that a page has equally often in both languages."""
    for path in sorted(sources.rglob("*.html")):
        page = path.relative_to(sources)
        if not (targets / page).is_file():
            continue
        translated = paragraphs(targets / page)
        for name, texts in paragraphs(path).items():
            if len(texts) == len(translated.get(name, ())):
                for source, target in zip(texts, translated[name], strict=True):
                    yield Pair(page.as_posix(), source, target)


def clean(pairs: Iterable[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """Returns the usable pairs, and the numbers read, left out (by reason) and kept."""
    counts: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        reason = _fault(pair.source, pair.target)
        if reason is None and pair.source.lower() in seen:
            reason = "source seen before"
        if reason:
            counts[f"left out: {reason}"] += 1
        else:
            seen.add(pair.source.lower())
            kept.append(pair)
    left_out = dict(sorted(counts.items(), key=lambda item: -item[1]))
    return kept, {"aligned": counts.total() + len(kept), "kept": len(kept), **left_out}


def _fault(source: str, target: str) -> str | None:
    lengths = [len(TOKEN.findall(text)) for text in (source, target)]
    if source == target:
        return "not translated"
    if min(lengths) < TOKENS[0]:
        return "one word or none"
    if max(lengths) > TOKENS[1]:
        return f"more than {TOKENS[1]} words"
    if max(lengths) > RATIO * min(lengths):
        return f"one side {RATIO} times as long"
    if min(_letters(source), _letters(target)) < LETTERS:
        return "hardly any letters"
    return None


def _letters(text: str) -> float:
    solid = "".join(text.split())
    return sum(map(str.isalpha, solid)) / max(1, len(solid))


def split_of(page: str) -> str:
    """Returns the split of a page: a function of its name alone."""
    number = int.from_bytes(hashlib.sha256(page.encode()).digest()[:8], "big") % EVERY
    return {0: "test", 1: "validation"}.get(number, "train")


class LohelpTranslate(tfds.core.GeneratorBasedBuilder):
    """Registered in TFDS as ``lohelp_translate/en-de`` and ``.../en-fr``.

    ``source``: the directory with a folder per language; None: where the packages install it.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS reads a plain dict)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=pair) for pair in PAIRS]  # noqa: RUF012

    def __init__(self, *, source: str | None = None, **kwargs: Any):
        self.source = source
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        languages = tuple(self.builder_config.name.split("-"))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Paragraphs of the help of LibreOffice, aligned by their ids.",
            features=tfds.features.FeaturesDict(
                {key: tfds.features.Text() for key in (*languages, "page")}
            ),
            supervised_keys=languages,
            homepage="https://help.libreoffice.org",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # apt has done it
        folders = locate(self.source or INSTALLED, self.builder_config.name)
        pairs, counts = clean(align(*folders))
        self.info.metadata["counts"] = counts
        parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
        for pair in pairs:
            parts[split_of(pair.page)].append(pair)
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict]]:
        source, target = self.builder_config.name.split("-")
        for i, pair in enumerate(pairs):
            yield i, {source: pair.source, target: pair.target, "page": pair.page}
