# SPDX-License-Identifier: Apache-2.0
"""Images given as files, folders (all images below them) and URLs."""

import logging
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from localglobal_jax.checkpoints import store
from localglobal_jax.data.images import readers, scan
from localglobal_jax.data.images.layout import shorten
from localglobal_jax.data.images.scan import ENDINGS

log = logging.getLogger(__name__)

EXAMPLES = 3  # files in a line of the log


class Found(NamedTuple):
    """An image, or a path that is not one and the reason."""

    path: str  # as it was given, or the folder's with the name in it
    folder: str = ""  # that was given, or in which the file is
    problem: str = ""


def find(given: Iterable[str | os.PathLike[str]]) -> list[Found]:
    """Returns the files given, and of folders the images below them, sorted by path.

    As in `folder`, hidden files and workdirs are left out, and links to folders followed once.
    Pictures in a folder of a kind that is not read, such as HEIC, are logged.
    """
    found: list[Found] = []
    for name in [os.fspath(one) for one in given]:
        try:
            path = locate(name)
            folder = path if path.is_dir() else path.parent
            inside, foreign = _inside(path) if folder == path else ([name], [])
        except (ValueError, OSError, ImportError) as error:
            found.append(Found(name, problem=_why(error)))
            continue
        found += [Found(file, _absolute(folder)) for file in inside]
        if foreign:
            kind, shown = scan.KIND, shorten(map(scan.readable, foreign), EXAMPLES)
            log.warning(
                "left out  %d %s: convert them to JPEG or PNG: %s", len(foreign), kind, shown
            )
        if not inside:
            endings = ", ".join(sorted(ENDINGS))
            found.append(Found(name, problem=f"this folder holds no picture ({endings})"))
    return found


def locate(name: str) -> epath.Path:
    """Returns the path of a file or URL. Raises ValueError for any other kind of address."""
    if not name:
        raise ValueError("the path is empty")
    scheme = re.match(r"\w+://", name)
    if not scheme or scheme[0] in ("gs://", "s3://"):
        if scheme and scheme[0] == "gs://":
            store.prepare()
        return epath.Path(name)
    url = urllib.parse.urlsplit(name)
    if scheme[0] != "file://" or url.netloc not in ("", "localhost") or not url.path:
        raise ValueError("want a local path, file:///PATH, gs://BUCKET/PATH or s3://BUCKET/PATH")
    return epath.Path(urllib.parse.unquote(url.path, errors="surrogateescape"))


def read(name: str, channels: int, *, upright: bool = True) -> np.ndarray:
    """Returns ``uint8 [h, w, channels]``, `upright` by its EXIF orientation.

    Raises ValueError with the reason.
    """
    try:
        return readers.decode(locate(name).read_bytes(), channels, upright=upright)
    except ValueError:
        raise
    except Exception as error:  # a store's own errors are of many kinds
        raise ValueError(_why(error)) from error


def below(found: Sequence[Found]) -> list[str]:
    """Returns the path of each below their common folder; no two files have the same."""
    root = os.path.commonpath([picture.folder for picture in found])
    return [os.path.relpath(_absolute(locate(picture.path)), root) for picture in found]


def _absolute(path: epath.Path) -> str:
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    return f"/{scheme}/{rest}" if found else os.path.abspath(text)


def _inside(directory: epath.Path) -> tuple[list[str], list[str]]:
    """Returns the images below a folder, and the pictures of kinds that are not read."""
    if "://" not in os.fspath(directory):
        listed = scan.scan(pathlib.Path(directory))
        lost = [  # reading them says why they cannot be read
            name
            for reason, name in listed.left_out
            if reason == scan.UNREADABLE
            or (reason == scan.BROKEN and scan.ending_of(name) in ENDINGS)
        ]
        others = [name for reason, name in listed.left_out if reason == scan.KIND]
        images, foreign = (
            [str(directory / name) for name in names]
            for names in (sorted([*listed.pictures, *lost]), others)
        )
        return images, foreign
    images, foreign = list[str](), list[str]()
    for path in sorted(directory.iterdir()):
        if scan.is_hidden(path.name):
            continue
        ending = scan.ending_of(path.name)
        if ending in ENDINGS:  # first: in a store every other question costs
            images.append(str(path))
        elif ending in scan.FOREIGN:
            foreign.append(str(path))
        elif path.is_dir():
            below = _inside(path)
            images += below[0]
            foreign += below[1]
    return images, foreign


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
