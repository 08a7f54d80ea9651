# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: one folder per class, ``DIR/cat/1.jpg``, ``DIR/dog/2.png``.

The folders of classes may lie in folders of splits (see `layout`). Else a picture's split is a
function of its class and name, so that it stays where it is when others come or go.
"""

import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import hashlib
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Self

import cv2
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.config.validation import unknown
from localglobal_jax.data import identity
from localglobal_jax.data.images import headers, readers, scan
from localglobal_jax.data.images import layout as layouts
from localglobal_jax.data.images.layout import SPLITS, shorten
from localglobal_jax.data.images.scan import readable, same_name
from localglobal_jax.data.tfds import gcs, records

log = logging.getLogger(__name__)

NAME = "folder"  # in place of a TFDS name
EVERY = 10  # one picture in so many is for testing, one for validation
NO_CLASS = "pictures in no folder of a class"
NO_SPLIT = "pictures in no folder of a split"
SHOWN = 20  # files in an error
EXAMPLES = 3  # files in a line of the log
CHANNELS = 3  # unless data.channels has another number
THREADS = 8
REQUESTS = 32  # pictures of a bucket that are fetched at a time
MARKED = 100_000  # pictures; of more, resuming compares names and sizes only
EDGE = 4096  # bytes at the start and the end of a file that tell contents apart
UNBALANCED = 10  # times as many pictures


class Picture(NamedTuple):
    """An image file, the number of its class, and its name: the class and the path below it."""

    path: pathlib.Path
    label: int
    name: str


class Folder(NamedTuple):
    """A listed folder and its layout."""

    root: gcs.Place
    found: scan.Scan
    tree: layouts.Node
    layout: layouts.Layout

    def split_of(self, name: str) -> tuple[str, str] | None:
        """Returns the split of a file below the root, and its path below that split's folder."""
        if not self.layout.splits:
            return "", name
        for split, folder in self.layout.splits.items():
            if name.startswith(f"{folder}/"):
                return split, name[len(folder) + 1 :]
        return None


_LISTED: contextvars.ContextVar[dict[tuple[str, str], Folder] | None] = contextvars.ContextVar(
    "listed folders", default=None
)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Context manager in which every folder is listed once, however many splits are opened."""
    known = _LISTED.get()
    token = _LISTED.set({} if known is None else known)
    try:
        yield
    finally:
        _LISTED.reset(token)


def open_folder(directory: str | None, layout: str = "auto") -> Folder:
    """Lists a data set. Raises ValueError if its layout is unclear (see `layout.choose`)."""
    root = _root(directory)
    listed = _LISTED.get()
    if listed is not None and (known := listed.get((str(root), layout))):
        return known
    try:
        found = scan.scan(root)
    except OSError as error:
        if gcs.is_bucket(root):
            raise
        raise ValueError(f"data.dir={directory}: {error.strerror}") from error
    tree = layouts.tree(found)
    opened = Folder(root, found, tree, layouts.choose(tree, layout, readable(str(root))))
    if listed is not None:
        listed[str(root), layout] = opened
    return opened


def classes(directory: str | None, layout: str = "auto") -> list[str]:
    """Returns the names of classes, sorted as text; ValueError for fewer than two."""
    return open_folder(directory, layout).layout.labels


def pictures(directory: str | None, split: str, layout: str = "auto") -> list[Picture]:
    """Returns the pictures of a split, sorted by name. Raises ValueError if there are none."""
    return _pictures(open_folder(directory, layout), split)


def _pictures(opened: Folder, split: str) -> list[Picture]:
    if split not in SPLITS:
        raise unknown("split of a folder (data.train_split, data.eval_splits):", split, SPLITS)
    root, names = opened.root, opened.layout.names
    label_of = {same_name(name): label for label, name in enumerate(names)}
    found, strange = [], collections.Counter[str]()
    for name in opened.found.pictures:
        place = opened.split_of(name)
        if place is None or place[0] not in ("", split):
            continue
        folder, inside, _ = place[1].partition("/")
        label = label_of.get(same_name(folder)) if inside else None
        if label is None:
            if inside and opened.layout.splits:
                strange[folder] += 1
        elif opened.layout.splits or split_of(place[1]) == split:
            found.append(Picture(root / name, label, place[1]))
    if strange:
        there = shorten(f"{readable(name)} {count}" for name, count in sorted(strange.items()))
        raise ValueError(
            f"{readable(f'{root}/{opened.layout.splits[split]}')}: {there} pictures, but train has "
            f"no such class. It has {shorten(opened.layout.labels)}"
        )
    if not found:
        raise ValueError(_no_pictures(opened, split))
    return found


def _no_pictures(opened: Folder, split: str) -> str:
    root, splits = readable(str(opened.root)), opened.layout.splits
    if not splits:
        return (
            f"no picture of {root} is in the split {split}: have more, or say which by the "
            f"folders {root}/train/CLASS and {root}/{split}/CLASS"
        )
    nodes = {name: opened.tree.at(folder) for name, folder in splits.items()}
    there = "; ".join(
        f"{readable(splits[name])} has {node.pictures} ({layouts.counts(node)})"
        for name, node in nodes.items()
    )
    labelled = [name for name, node in nodes.items() if node.pictures > node.direct]
    if split in splits:
        place = f"{root}/{readable(splits[split])}"
        why = f"{place} holds pictures in no folder of a class, thus without labels"
    else:
        why = f"{root} has no folder of that name"
    ways = [
        f"--config.data.eval_splits=\"('{name}',)\" evaluates on {name}"
        for name in labelled
        if name != "train"
    ]
    ways += [
        f"--config.data.dir='{root}/{readable(splits['train'])}' takes a tenth of those pictures "
        "for validation and a tenth for testing",
        "`localglobal classify` names pictures without labels",
    ]
    return f"no picture of {root} is in the split {split}: {why}. {there}. {'; '.join(ways)}"


def split_of(name: str) -> str:
    """Returns the split of ``CLASS/NAME`` in a folder without splits: a function of the name."""
    words = name.encode("utf-8", "surrogateescape")
    number = int.from_bytes(hashlib.sha256(words).digest()[:8], "big") % EVERY
    return {0: "test", 1: "validation"}.get(number, "train")


# ------------------------------------------------------------------------- notes on a folder


def left_out(opened: Folder) -> dict[str, list[str]]:
    """Returns reason -> names of the files and folders that are not taken."""
    found = collections.defaultdict(list)
    for reason, name in opened.found.left_out:
        found[reason].append(name)
    names = {same_name(name) for name in opened.layout.names}
    for name in opened.found.pictures:
        place = opened.split_of(name)
        if place is None:
            found[NO_SPLIT].append(name)
        elif "/" not in place[1] or same_name(place[1].partition("/")[0]) not in names:
            found[NO_CLASS].append(name)
    return dict(sorted(found.items()))


def _class_of(opened: Folder, name: str) -> str:
    """Returns the class in whose folder a file lies; "" for none."""
    place = opened.split_of(name)
    folder = place[1].partition("/")[0] if place else ""
    return readable(folder) if folder in opened.layout.names else ""


def _left_out_counts(opened: Folder) -> dict[str, int]:
    """Returns ``{"left out, REASON": 3, "left out, REASON/cat": 2}``."""
    counts: dict[str, int] = {}
    for reason, names in left_out(opened).items():
        counts[f"left out, {reason}"] = len(names)
        for label, n in sorted(collections.Counter(_class_of(opened, x) for x in names).items()):
            if label:
                counts[f"left out, {reason}/{label}"] = n
    return counts


def notes(opened: Folder) -> list[str]:
    """Returns lines on the layout, the order of classes, and what is left out."""
    lines, labels = [], opened.layout.labels
    if splits := opened.layout.splits:
        there = ", ".join(f"{split} in {readable(folder)}/" for split, folder in splits.items())
        lines.append(f"splits   {there} (data.layout)")
    if labels != sorted(labels, key=layouts.natural):
        lines.append(
            f"classes  are numbered in the order of their names as text: {shorten(labels, 12)}"
        )
    without = [
        f"{readable(name)} ({node.others + node.foreign} other files)"
        for name, node in sorted(opened.tree.children.items())
        if not splits and not node.pictures and name not in opened.layout.names and not node.runs
    ]
    if without:
        lines.append(
            f"left out  folders without pictures, which are no classes: {shorten(without)}. "
            "data.layout=classes takes every folder"
        )
    for reason, names in left_out(opened).items():
        ends = collections.Counter(scan.ending_of(name) for name in names)
        kinds = ", ".join(f"{end or 'no ending'} {n}" for end, n in ends.most_common(5))
        shown = shorten(map(readable, names), EXAMPLES)
        of_kind = f" ({kinds})" * (reason in (scan.KIND, scan.OTHER))
        of_kind += ": convert them to JPEG or PNG" * (reason == scan.KIND)
        lines.append(f"left out  {len(names)} {reason}{of_kind}, such as {shown}")
    return lines


def count(
    directory: str | None,
    layout: str = "auto",
    *,
    upright: bool = True,
    needed: Collection[str] = SPLITS,
) -> dict[str, int]:
    """Returns ``{"train": 90, "train/cat": 45, ...}``, after decoding every picture.

    Logs how many have an EXIF orientation; `upright`: whether a run turns them. Also counts what is
    left out, by reason and class, and exact copies. Splits that are not `needed` may be empty.
    Raises ValueError that lists the files that are not whole pictures.
    """
    counts: dict[str, int] = {}
    bad: list[str] = []
    turned = 0
    same = collections.defaultdict[bytes, list[tuple[str, int, str]]](list)
    opened = open_folder(directory, layout)
    labels = opened.layout.labels
    for text in notes(opened):
        log.warning("%s", text)
    log.info("classes  %s", shorten(f"{i} {label}" for i, label in enumerate(labels)))
    for split in SPLITS:
        if folders := opened.layout.splits:
            node = opened.tree.at(folders[split]) if split in folders else layouts.Node()
            if node.pictures == node.direct:  # left out, see `notes`
                continue
        try:
            reader = FolderReader(directory, split, opened=opened)
        except ValueError:
            if folders or split in needed:
                raise
            continue  # by the hash no picture is in it, and nobody asked for it
        counts[split] = len(reader)
        balance = reader.balance()
        counts |= {f"{split}/{name}": n for name, n in balance.items()}
        for (why, mark), picture in zip(reader.checked(), reader.pictures, strict=True):
            bad += [why] if why else []
            same[mark].append((split, picture.label, f"{split}: {picture.name}"))
        turned += reader.turned
        if split == "train":
            for text in _balance_notes(balance):
                log.warning("%s", text)
    if bad:
        shown = "\n  ".join(bad[:SHOWN]) + (f"\n  and {len(bad) - SHOWN} more" * (len(bad) > SHOWN))
        raise ValueError(
            f"{len(bad)} files are not whole pictures:\n  {shown}\n"
            "Mend or remove them, or let train and evaluate skip a few such files with "
            "data.max_bad_records"
        )
    if turned:
        how = "turned upright" if upright else "left as stored"
        log.info(
            "EXIF orientation: %d pictures are %s (data.exif_orientation=%s)", turned, how, upright
        )
    return counts | _left_out_counts(opened) | _copies(list(same.values()))


def _balance_notes(balance: dict[str, int]) -> list[str]:
    lines = []
    if empty := [name for name, n in balance.items() if not n]:
        lines.append(f"warning: no picture to train on of {shorten(empty)}")
    some = {name: n for name, n in balance.items() if n}
    most, least = max(some, key=some.__getitem__), min(some, key=some.__getitem__)
    if some[most] >= UNBALANCED * some[least]:
        lines.append(
            f"warning: unbalanced, {some[most]} pictures to train on of {most}, {some[least]} of "
            f"{least}; data.class_weights=balanced weights the loss"
        )
    return lines


def _copies(groups: Sequence[Sequence[tuple[str, int, str]]]) -> dict[str, int]:
    """Counts exact copies, and logs those that matter. A group: (split, label, shown name)."""
    counts: dict[str, int] = {}
    kinds: dict[str, tuple[str, Callable[[Sequence[tuple[str, int, str]]], bool]]] = {
        "copies": ("", lambda group: True),
        "copies in two splits": (
            "what is evaluated was trained on; remove one of each",
            lambda group: len({split for split, _, _ in group}) > 1,
        ),
        "copies in two classes": (
            "one of their labels is wrong",
            lambda group: len({label for _, label, _ in group}) > 1,
        ),
    }
    for kind, (why, chosen) in kinds.items():
        found = [group for group in groups if len(group) > 1 and chosen(group)]
        if not found:
            continue
        counts[kind] = sum(len(group) - 1 for group in found)
        by = {split if "splits" in kind else label: name for split, label, name in found[0]}
        pair = list(by.values()) if len(by) > 1 else [name for _, _, name in found[0]]
        example = " = ".join(map(readable, pair[:2]))
        log.warning("%s: %d%s, such as %s", kind, counts[kind], f" ({why})" * bool(why), example)
    return counts


class FolderReader:
    """A `readers.Reader` of the pictures of a split; see `readers.decode` for the options."""

    shape: tuple[int, int] | None = None  # they differ

    def __init__(
        self,
        directory: str | None,
        split: str,
        layout: str = "auto",
        *,
        opened: Folder | None = None,
        channels: int = CHANNELS,
        upright: bool = False,
    ):
        self.channels, self.upright, self.turned = channels, upright, 0
        opened = opened or open_folder(directory, layout)
        self.names, self.split = opened.layout.labels, split
        self.pictures, self.classes = _pictures(opened, split), len(self.names)
        self._notes = notes(opened) if split == "train" else []
        marks = opened.found.marks  # of a bucket, by path below the root
        below = len(str(opened.root)) + 1
        self._marks = [marks[str(p.path)[below:]] for p in self.pictures] if marks else []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "identities"}

    def balance(self) -> dict[str, int]:
        """Returns the number of pictures per class."""
        labels = collections.Counter(picture.label for picture in self.pictures)
        return {name: labels[i] for i, name in enumerate(self.names)}

    def announce(self) -> Self:
        """Logs the balance, what is left out of training, and returns the reader."""
        balance = self.balance()
        if self.split == "train":
            for text in self._notes + _balance_notes(balance):
                log.warning("%s", text)
        shown = shorten(f"{name} {n}" for name, n in balance.items())
        log.info("pictures %s: %d (%s)", self.split, len(self), shown)
        return self

    def __len__(self) -> int:
        return len(self.pictures)

    def block(self, indices: Sequence[int]) -> list[tuple[bytes, int] | records.BadRecord]:
        if not gcs.is_bucket(self.pictures[0].path):
            return [self._read(index) for index in indices]
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self._read, indices))

    def _read(self, index: int) -> tuple[bytes, int] | records.BadRecord:
        picture = self.pictures[index]
        try:
            with gcs.named_in_errors(picture.path):
                return picture.path.read_bytes(), picture.label
        except OSError as error:
            if gcs.is_bucket(picture.path) and gcs.may_pass(error):
                raise  # of the network, not of the picture
            return self.bad(index, error.strerror or "it is missing")

    def decode(
        self, record: tuple[bytes, int], part: readers.Part | None = None
    ) -> tuple[np.ndarray, int]:
        data, label = record
        if not data:
            raise ValueError("the file is empty")
        return readers.decode(data, self.channels, part, upright=self.upright), label

    def label(self, record: tuple[bytes, int]) -> int:
        return record[1]

    def name(self, record: tuple[bytes, int], index: int) -> str:
        return os.path.splitext(self.pictures[index].name)[0]

    def check_names(self) -> None:
        """Raises ValueError if two pictures have one `name`, as ``1.jpg`` and ``1.png`` do."""
        seen: dict[str, int] = {}
        for i, picture in enumerate(self.pictures):
            name = os.path.splitext(picture.name)[0]
            if (twin := seen.setdefault(name, i)) != i:
                raise ValueError(
                    f"{self._shown(twin)} and {self._shown(i)} would have the same label map, "
                    f"{readable(name)}: rename one of them, and its map"
                )

    def bad(self, index: int, why: object) -> records.BadRecord:
        return records.BadRecord(
            f"{self._shown(index)}: {why}. Mend or remove it, or skip a few such files "
            "with data.max_bad_records"
        )

    def _shown(self, index: int) -> str:
        return readable(str(self.pictures[index].path))

    def checked(self) -> list[tuple[str, bytes]]:
        """Returns ``("FILE: why", digest)`` of every picture; "" for one that can be decoded.

        Counts in `turned` those that can be decoded and have an EXIF orientation.
        """

        def check(index: int) -> tuple[str, bytes, bool]:
            record = self._read(index)
            if isinstance(record, records.BadRecord):
                return str(record), os.urandom(16), False  # not a copy of another
            mark = hashlib.blake2b(record[0], digest_size=16).digest()
            try:
                self.decode(record)
                turned = headers.checked(record[0]).orientation > 1
            except (ValueError, cv2.error) as error:
                return f"{self._shown(index)}: {error}", mark, False
            return "", mark, turned

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(check, range(len(self))))
        self.turned = sum(turned for _, _, turned in found)  # not by the threads: they lose some
        return [(why, mark) for why, mark, _ in found]

    @functools.cached_property
    def identities(self) -> list[identity.Record]:
        """The name, size and mark of every picture, see `identity`."""
        if self._marks:
            sizes = (mark.split(" ") for mark in self._marks)
            found = [(int(size), f"crc32c {crc32c}") for size, crc32c in sizes]
        else:
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                paths = (picture.path for picture in self.pictures)
                found = list(pool.map(_edges if len(self) <= MARKED else _size, paths))
        return [
            identity.Record(same_name(picture.name), size, mark)
            for picture, (size, mark) in zip(self.pictures, found, strict=True)
        ]

    def identity(self) -> dict[str, str]:
        """Returns digests of the names and contents of the pictures, in their order."""
        kind = "crc32c" if self._marks else "edges" if len(self) <= MARKED else ""
        return identity.of_named(self.identities, kind)


def _size(path: pathlib.Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, ""
    except OSError:
        return -1, ""


def _edges(path: pathlib.Path) -> tuple[int, str]:
    """Returns the size of a file, and a checksum of its first and last bytes."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            value = zlib.crc32(file.read(EDGE))
            if size > EDGE:
                file.seek(max(EDGE, size - EDGE))
                value = zlib.crc32(file.read(EDGE), value)
    except OSError:  # reading it will report that
        return -1, "unreadable"
    return size, f"edges {value:08x}"


def check_workdir(options: schema.Images, directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if `directory`, of a run, holds pictures of its data set.

    It would be taken for a workdir from then on, and its pictures left out. Any other folder
    inside the data set may be a workdir: `scan` leaves it out.
    """
    if options.mock or options.name != NAME:
        return
    opened = open_folder(options.dir, options.layout)
    place = _real(directory)
    for folder in ("", *opened.found.folders):
        node = opened.tree.at(folder)
        if (node.pictures or not folder) and _real(opened.root / folder) == place:
            raise ValueError(
                f"--workdir {readable(str(directory))} is a folder of pictures of data.dir="
                f"{readable(str(options.dir))}: give another one, such as runs/mine. It may be "
                "inside data.dir, where workdirs are left out of the data"
            )


def _real(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path).rstrip("/")
    return text if gcs.is_bucket(path) else os.path.realpath(os.path.expanduser(text or "/"))


def _root(directory: str | None) -> gcs.Place:
    if not directory:
        raise ValueError("data.name=folder needs data.dir: the folder with a folder per class")
    root = gcs.place(directory).expanduser()
    if gcs.is_bucket(root):
        gcs.check_bucket(root)
    if not root.is_dir():
        raise ValueError(f"data.dir={readable(directory)}: there is no such folder")
    return root
