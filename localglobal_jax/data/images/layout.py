# SPDX-License-Identifier: Apache-2.0
"""Layouts of image folders: classes and splits, as a function of the listing.

Two layouts: "classes" (``DIR/cat/1.jpg``) and "splits" (``DIR/train/cat/1.jpg``). Splits have many
names (`WORDS`), in any case, alone or with a common rest (``seg_train``, ``seg_test``), and may lie
one folder deeper than DIR, or than the split (``training/training/cat``).
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from localglobal_jax.data.images import scan as scans
from localglobal_jax.data.images.scan import readable, same_name

SPLITS = ("train", "validation", "test")
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Folders that are no class while they hold no picture: of splits, and of what programs write.
NOT_CLASSES = {
    "cache",
    "checkpoints",
    "log",
    "logs",
    "mlruns",
    "output",
    "outputs",
    "runs",
    "wandb",
}
NOT_CLASSES |= WORDS.keys()
SHOWN = 20  # folders in a message
ORDER = "data.layout=classes (each folder is a class) or data.layout=splits (train holds classes)"


@dataclasses.dataclass
class Node:
    """A folder: its folders, and the numbers of files at any depth, by their kind."""

    children: "dict[str, Node]" = dataclasses.field(default_factory=dict)
    direct: int = 0  # pictures in the folder itself
    pictures: int = 0
    foreign: int = 0  # pictures that are not read
    others: int = 0  # other files, unreadable folders
    runs: int = 0  # workdirs, overlays
    tables: list[str] = dataclasses.field(default_factory=list)  # names of CSV files

    def chain(self, folder: str) -> "list[Node]":
        """Returns the nodes from this one to `folder` below it, and makes those missing."""
        chain = [self]
        for part in folder.split("/") if folder else ():
            chain.append(chain[-1].children.setdefault(part, Node()))
        return chain

    def at(self, folder: str) -> "Node":
        """Returns the node of a folder below this one."""
        return self.chain(folder)[-1]


class Layout(NamedTuple):
    """The folders of classes. Names are relative to the root; "" is the root."""

    splits: dict[str, str]  # split -> folder that holds the classes; empty: split by names
    names: tuple[str, ...]  # folders of the classes, sorted, in the root or in each split

    @property
    def labels(self) -> list[str]:
        """Returns the names of the classes as text, in one Unicode form on all systems."""
        return [readable(same_name(name)) for name in self.names]


def tree(scan: scans.Scan) -> Node:
    """Returns the root of the folders that a scan has found, with counts."""
    root = Node()
    for folder in scan.folders:
        root.chain(folder)
    for name in scan.pictures:
        chain = root.chain(name.rpartition("/")[0])
        chain[-1].direct += 1
        for node in chain:
            node.pictures += 1
    for reason, name in scan.left_out:
        if reason == scans.HIDDEN:
            continue
        # A workdir is the folder itself, a file is in one.
        chain = root.chain(name if reason == scans.RUN else name.rpartition("/")[0])
        if scans.ending_of(name) in (".csv", ".tsv"):
            chain[-1].tables.append(name)
        for node in chain:
            node.foreign += reason == scans.KIND
            node.runs += reason in (scans.RUN, scans.OVERLAY)
            node.others += reason not in (scans.KIND, scans.RUN, scans.OVERLAY)
    return root


def choose(root: Node, kind: str, shown: str) -> Layout:
    """Returns the layout of a data set. Raises ValueError, with counts, for one that is unclear.

    ``kind``: "auto", "classes" or "splits". ``shown``: the root's path, for messages.
    """
    if kind == "classes":
        return _classes(root, kind, shown)
    splits = find_splits(root, shown)
    if kind == "splits" and "train" not in splits:
        at, below = _only_folder(root)
        splits = {split: f"{at}/{name}" for split, name in find_splits(below, shown).items()}
        if "train" not in splits:
            raise ValueError(
                f"data.layout=splits, but {shown} has no folder train (or training): {counts(root)}"
            )
        return _of_splits(root, splits, kind, shown)
    if "train" in splits:
        train, taken = root.children[splits["train"]], set(splits.values())
        beside = [n for n, c in root.children.items() if c.pictures and n not in taken]
        nested = any(child.pictures for child in train.children.values())
        if kind == "splits" or (nested and (not beside or len(splits) > 1)):
            return _of_splits(root, splits, kind, shown)
        if nested and not train.direct:
            raise ValueError(
                f"{shown} is unclear: {splits['train']} may be a class or the training split, as "
                f"it holds folders and {', '.join(map(readable, beside))} lie beside it "
                f"({counts(root)}). Say which: {ORDER}"
            )
        if not beside:
            raise ValueError(_without_classes(train, f"{shown}/{splits['train']}"))
    elif (only := _only_folder(root))[0]:
        at, below = only
        inside = find_splits(below, shown)
        if "train" in inside and any(
            child.pictures for child in below.children[inside["train"]].children.values()
        ):
            splits = {split: f"{at}/{name}" for split, name in inside.items()}
            return _of_splits(root, splits, kind, shown)
    return _classes(root, kind, shown)


def find_splits(root: Node, shown: str) -> dict[str, str]:
    """Returns split -> name of its folder, of folders that hold any picture.

    Raises ValueError for two folders of one split.
    """
    exact: dict[str, list[str]] = {}
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, child in sorted(root.children.items()):
        if not child.pictures + child.foreign:
            continue
        if (word := name.lower()) in WORDS:
            exact.setdefault(WORDS[word], []).append(name)
        parts = re.split(r"[_\-. ]+", word)
        inside = [i for i, part in enumerate(parts) if part in WORDS]
        if len(parts) > 1 and len(inside) == 1:
            (i,) = inside
            rest = (*parts[:i], "*", *parts[i + 1 :])
            groups.setdefault(rest, {}).setdefault(WORDS[parts[i]], []).append(name)
    found = exact
    if not exact:
        found = next((g for g in groups.values() if "train" in g and len(g) > 1), {})
    for split, names in found.items():
        if len(names) > 1:
            raise ValueError(
                f"{shown} has two folders of the split {split}: {', '.join(names)}. Rename or "
                "remove one, or set data.layout=classes if they are classes"
            )
    return {split: names[0] for split, names in found.items()}


def is_class(node: Node, kind: str) -> bool:
    """Returns whether a folder beside other classes is one: it holds pictures, or nothing.

    A folder of other files (annotations, logs), of workdirs or of overlays is not.
    """
    empty = not node.runs and (kind == "classes" or not node.others)
    return bool(node.pictures or node.foreign or empty)


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts 2 before 10; names are sorted as text everywhere else."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]


def _of_splits(root: Node, splits: dict[str, str], kind: str, shown: str) -> Layout:
    deep = {split: _deepest(root, folder) for split, folder in splits.items()}
    train = root.at(deep["train"])
    names = tuple(sorted(n for n, child in train.children.items() if is_class(child, kind)))
    where = f"{shown}/{deep['train']}"
    _check(train, names, where)
    return Layout(deep, names)


def _deepest(root: Node, folder: str) -> str:
    """Returns the folder of a split, or the one inside it that has its name or another split's."""
    node = root.at(folder)
    inside, below = _only_folder(node)
    again = inside.lower() == folder.rpartition("/")[2].lower() or inside.lower() in WORDS
    if inside and again and (len(below.children) > 1 or below.direct):
        return f"{folder}/{inside}"
    return folder


def _only_folder(node: Node) -> tuple[str, Node]:
    """Returns the only folder with pictures and its name, if none lie beside it; else ""."""
    inside = [(name, child) for name, child in node.children.items() if child.pictures]
    return inside[0] if len(inside) == 1 and not node.direct else ("", Node())


def _classes(root: Node, kind: str, shown: str) -> Layout:
    named = {
        name: child
        for name, child in root.children.items()
        if kind == "classes" or name.lower() not in NOT_CLASSES or child.pictures
    }
    names = tuple(sorted(name for name, child in named.items() if is_class(child, kind)))
    _check(root, names, shown)
    return Layout({}, names)


def _check(node: Node, names: tuple[str, ...], shown: str) -> None:
    """Raises ValueError unless the folders `names` are two classes or more."""
    forms: dict[str, str] = {}
    for name in names:
        if (other := forms.setdefault(same_name(name), name)) != name:
            raise ValueError(
                f"{shown} has two folders called {name!r} whose names differ in the form of their "
                f"Unicode characters only ({other!a}, {name!a}): merge or rename one"
            )
    if len(names) >= 2:
        return
    if not names:
        raise ValueError(_without_classes(node, shown))
    only = node.children[names[0]]
    inside = [name for name, child in only.children.items() if child.pictures]
    hint = ""
    if len(inside) > 1:
        hint = (
            f" If the folders in it are the classes ({counts(only)}): "
            f"--config.data.dir='{readable(f'{shown}/{names[0]}')}'"
        )
    raise ValueError(
        f"{shown} has one class only ({counts(node)}): a classifier needs two folders of "
        f"pictures or more, such as {shown}/cat and {shown}/dog, or these in {shown}/train and "
        f"{shown}/validation.{hint}"
    )


def _without_classes(node: Node, shown: str) -> str:
    tables = f" Labels are not read from {', '.join(map(readable, node.tables[:3]))}."
    return (
        f"{shown} has 0 folders of pictures ({counts(node)}): want one per class, such as "
        f"{shown}/cat and {shown}/dog, or these in {shown}/train and {shown}/validation."
        f"{tables if node.tables else ''}"
    )


def counts(node: Node) -> str:
    """Returns "cat 40, dog 41, 3 in no folder", the pictures of each folder."""
    parts = [
        f"{readable(name)} {child.pictures}"
        + (f" ({child.foreign} not read)" * bool(child.foreign))
        for name, child in sorted(node.children.items())
        if child.pictures or child.foreign
    ]
    if node.direct or not parts:
        parts.append(f"{node.direct} pictures in no folder")
    return shorten(parts)


def shorten(parts: Iterable[str], most: int = SHOWN) -> str:
    """Returns the parts joined by commas, at most so many, and the number of the others."""
    parts = list(parts)
    return ", ".join(parts[:most]) + f" and {len(parts) - most} more" * (len(parts) > most)
