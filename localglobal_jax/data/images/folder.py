# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: one folder per class, ``DIR/cat/1.jpg``, ``DIR/dog/2.png``.

The folders of classes may lie in folders of splits (see `layout`). Else a picture's split is a
function of its class and name, so that it stays where it is when others come or go.
"""

import collections
import contextlib
import contextvars
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from localglobal_jax.config import renamed, schema
from localglobal_jax.config.validation import unknown
from localglobal_jax.data.images import layout as layouts
from localglobal_jax.data.images import scan
from localglobal_jax.data.images.layout import SPLITS, shorten
from localglobal_jax.data.images.scan import readable, same_name
from localglobal_jax.data.tfds import gcs

NAME = "folder"  # in place of a TFDS name
EVERY = 10  # one picture in so many is for testing, one for validation


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
    return pictures_of(open_folder(directory, layout), split)


def pictures_of(opened: Folder, split: str) -> list[Picture]:
    """Returns the pictures of a split of a listed folder, as `pictures`."""
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


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
