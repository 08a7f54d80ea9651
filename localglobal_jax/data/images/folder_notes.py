# SPDX-License-Identifier: Apache-2.0
"""Lines on a folder of pictures: its layout, its classes, and the files that are left out."""

import collections

from localglobal_jax.data.images import layout as layouts
from localglobal_jax.data.images import scan
from localglobal_jax.data.images.folder import Folder
from localglobal_jax.data.images.layout import shorten
from localglobal_jax.data.images.scan import readable, same_name

NO_CLASS = "pictures in no folder of a class"
NO_SPLIT = "pictures in no folder of a split"
EXAMPLES = 3  # files in a line of the log
UNBALANCED = 10  # times as many pictures


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


def of_folder(opened: Folder) -> list[str]:
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


def of_balance(balance: dict[str, int]) -> list[str]:
    """Returns warnings on the number of pictures to train on per class."""
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
