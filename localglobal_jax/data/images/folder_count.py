# SPDX-License-Identifier: Apache-2.0
"""Checks and counts the pictures of a folder, for ``localglobal prepare``."""

import collections
import logging
from collections.abc import Callable, Collection, Sequence

from localglobal_jax.data.images import folder, folder_notes
from localglobal_jax.data.images import layout as layouts
from localglobal_jax.data.images.folder import SPLITS
from localglobal_jax.data.images.folder_reader import FolderReader
from localglobal_jax.data.images.layout import shorten
from localglobal_jax.data.images.scan import readable

log = logging.getLogger(__name__)

SHOWN = 20  # files in an error


def count(
    directory: str | None,
    layout: str = "auto",
    *,
    upright: bool = True,
    needed: Collection[str] | None = None,
) -> dict[str, int]:
    """Returns ``{"train": 90, "train/cat": 45, ...}``, after decoding every picture.

    Logs how many have an EXIF orientation; `upright`: whether a run turns them. Also counts what is
    left out, by reason and class, and exact copies. Splits that are not `needed` may be empty
    (None: all are needed, or those that have a folder). Raises ValueError that lists the files that
    are not whole pictures.
    """
    counts: dict[str, int] = {}
    bad: list[str] = []
    turned = 0
    same = collections.defaultdict[bytes, list[tuple[str, int, str]]](list)
    opened = folder.open_folder(directory, layout)
    labels = opened.layout.labels
    for text in folder_notes.of_folder(opened):
        log.warning("%s", text)
    log.info("classes  %s", shorten(f"{i} {label}" for i, label in enumerate(labels)))
    folders = opened.layout.splits
    if needed is None:
        needed = () if folders else SPLITS
    for split in dict.fromkeys([*SPLITS, *needed]):  # an unknown one is an error of the reader
        if folders:
            node = opened.tree.at(folders[split]) if split in folders else layouts.Node()
            if node.pictures == node.direct and split not in needed:  # see `folder_notes`
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
            for text in folder_notes.of_balance(balance):
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


def _class_of(opened: folder.Folder, name: str) -> str:
    """Returns the class in whose folder a file lies; "" for none."""
    place = opened.split_of(name)
    name = place[1].partition("/")[0] if place else ""
    return readable(name) if name in opened.layout.names else ""


def _left_out_counts(opened: folder.Folder) -> dict[str, int]:
    """Returns ``{"left out, REASON": 3, "left out, REASON/cat": 2}``."""
    counts: dict[str, int] = {}
    for reason, names in folder_notes.left_out(opened).items():
        counts[f"left out, {reason}"] = len(names)
        for label, n in sorted(collections.Counter(_class_of(opened, x) for x in names).items()):
            if label:
                counts[f"left out, {reason}/{label}"] = n
    return counts
