# SPDX-License-Identifier: Apache-2.0
"""Lists the pictures below a folder, on disk or in a bucket, and what is left out, with reasons.

Left out are hidden files and folders, those that operating systems and archivers make, workdirs of
this package, and files that are not pictures by their endings. Links to folders are followed, each
folder once. A name that is not UTF-8 is kept as the file system has it; `readable` shows it.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from localglobal_jax.checkpoints import workdir
from localglobal_jax.checkpoints.store import StoreFailed
from localglobal_jax.data.tfds import gcs

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
# Pictures that are not read, or not under this ending.
FOREIGN = frozenset(
    {".apng", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jfif", ".jp2", ".jpe"}
    | {".jxl", ".nef", ".orf", ".pgm", ".ppm", ".raf", ".rw2", ".svg", ".tif", ".tiff"}
)
# What systems, archivers and network storage put beside files. Lower case.
SYSTEM = frozenset(
    {"__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
    | {"$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)

HIDDEN = "hidden or of the system"
RUN = "workdirs of runs"
OVERLAY = "overlays of localglobal classify"
KIND = "pictures of another kind"
OTHER = "not pictures"
BROKEN = "broken links"
LINKED = "links to a folder that is here already"
UNREADABLE = "folders that cannot be read"

MADE_BY = b"Software\0localglobal classify --overlay"  # text in the header of such a PNG
HEADER = 128  # bytes that hold it
CONFIG_BYTES = 2**20  # no config.json of a run is larger


class Scan(NamedTuple):
    """The files below a folder. Names are relative to it, with "/" between their parts."""

    pictures: list[str]  # sorted by their parts
    folders: list[str]  # that are not left out
    left_out: list[tuple[str, str]]  # (reason, name of a file or a folder)
    marks: dict[str, str]  # in a bucket: picture -> size and checksum


class _Entry(NamedTuple):
    name: str
    kind: str  # "file", "folder", "link" (to a folder), or a reason for leaving it out
    mark: str = ""


def scan(root: gcs.Place) -> Scan:
    """Lists `root`. Raises OSError or ValueError if it cannot be listed at all."""
    found = Scan([], [], [], {})
    store = _Store(root) if gcs.is_bucket(root) else _Disk(root)
    for entry in _kept(store.entries(""), "", found):
        if entry.kind == "file":
            _add_file(store, found, entry.name, entry)
        else:
            _walk(store, entry.name, found)
    found.pictures.sort(key=lambda name: name.split("/"))
    found.folders.sort(key=lambda name: name.split("/"))
    found.left_out.sort()
    return found


def readable(name: str) -> str:
    """Returns `name` with escapes for bytes that are not UTF-8 and for characters of control."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text
    )


def same_name(name: str) -> str:
    """Returns `name` in the form (NFC) in which equal names of different systems are equal."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _walk(store: "_Disk | _Store", top: str, found: Scan) -> None:
    """Lists one folder directly below the root.

    Folders come before links to them, so that a picture that both reach has the name without the
    link. "Once" holds below each of these folders: `train` and `validation` may be the same.
    """
    identity = store.identity(top)
    if identity in store.above:
        found.left_out.append((LINKED, top))
        return
    seen = {identity} | store.above
    found.folders.append(top)
    folders, links = [top], list[str]()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            links.sort(reverse=True)
            folder = links.pop()
            if (identity := store.identity(folder)) in seen:
                found.left_out.append((LINKED, folder))
                continue
            seen.add(identity)
            found.folders.append(folder)
        try:
            entries = store.entries(folder)
        except OSError:
            found.left_out.append((UNREADABLE, folder))
            continue
        if _is_run(store, folder, {entry.name for entry in entries}):
            found.left_out.append((RUN, folder))
            continue
        for entry in _kept(entries, folder, found):
            name = f"{folder}/{entry.name}"
            if entry.kind == "file":
                _add_file(store, found, name, entry)
            elif entry.kind == "link":
                links.append(name)
            elif (identity := store.identity(name)) in seen:  # below a link
                found.left_out.append((LINKED, name))
            else:
                found.folders.append(name)
                seen.add(identity)
                folders.append(name)


def _kept(entries: Iterable[_Entry], folder: str, found: Scan) -> Iterator[_Entry]:
    """Yields the files and folders that are not left out; notes the others."""
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if is_hidden(entry.name):
            found.left_out.append((HIDDEN, name))
        elif entry.kind in ("file", "folder", "link"):
            yield entry
        else:
            found.left_out.append((entry.kind, name))


def _add_file(store: "_Disk | _Store", found: Scan, name: str, entry: _Entry) -> None:
    ending = ending_of(entry.name)
    if ending == ".png" and ending_of(entry.name[:-4]) in ENDINGS and store.is_overlay(name):
        found.left_out.append((OVERLAY, name))
    elif ending in ENDINGS:
        found.pictures.append(name)
        if entry.mark:
            found.marks[name] = entry.mark
    else:
        found.left_out.append((KIND if ending in FOREIGN else OTHER, name))


def is_hidden(name: str) -> bool:
    """Returns whether a file or a folder of this name is hidden or of the system."""
    return name.startswith(".") or name.lower() in SYSTEM


def ending_of(name: str) -> str:
    """Returns the ending of a file's name in lower case, such as ".jpg"."""
    return os.path.splitext(name)[1].lower()


def _is_run(store: "_Disk | _Store", folder: str, names: set[str]) -> bool:
    """Returns whether a folder is a workdir, or a model that `convert` or `export` wrote."""
    if "config.json" in names:
        if names & {"checkpoints", "metrics.jsonl"}:
            return True
        try:
            config = json.loads(store.text(f"{folder}/config.json"))
            if isinstance(config, dict):
                exported = config.get("library_name") == "localglobal_jax"
                return exported or {"task", "model", "data"} <= config.keys()
        except StoreFailed:
            raise
        except (OSError, ValueError):  # unreadable, or not JSON
            pass
    if "checkpoints" not in names:
        return False
    with contextlib.suppress(OSError):
        for entry in store.entries(f"{folder}/checkpoints"):
            if re.fullmatch(r"\d+", entry.name):
                inside = store.entries(f"{folder}/checkpoints/{entry.name}")
                return any(below.name == workdir.MANIFEST for below in inside)
    return False


class _Disk:
    """A local folder."""

    def __init__(self, root: pathlib.Path):
        self._root = os.fspath(root)
        real = pathlib.Path(os.path.realpath(root))
        self.above = {_identity(path) for path in (real, *real.parents)}  # a link there is a loop

    def _path(self, name: str) -> str:
        return os.path.join(self._root, *name.split("/")) if name else self._root

    def identity(self, name: str) -> Any:
        return _identity(self._path(name))

    def is_overlay(self, name: str) -> bool:
        with contextlib.suppress(OSError), open(self._path(name), "rb") as file:
            return MADE_BY in file.read(HEADER)
        return False

    def text(self, name: str) -> str:
        with open(self._path(name), "rb") as file:
            return file.read(CONFIG_BYTES).decode("utf-8")

    def entries(self, name: str) -> list[_Entry]:
        with os.scandir(self._path(name)) as found:
            return [_Entry(entry.name, _kind(entry)) for entry in found]


def _identity(path: str | os.PathLike[str]) -> Any:
    try:
        about = os.stat(path)
    except OSError:  # without permission: listing it will fail, and is noted
        return os.fspath(path)
    return about.st_dev, about.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    if not entry.is_symlink():
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "file" if entry.is_file(follow_symlinks=False) else OTHER  # a pipe, a device
    try:
        mode = os.stat(entry.path).st_mode
    except OSError:  # it leads nowhere, or in a circle
        return BROKEN
    if stat.S_ISDIR(mode):
        return "link"
    return "file" if stat.S_ISREG(mode) else OTHER


class _Store:
    """A folder of a bucket, from one listing of all objects below it."""

    above: frozenset[Any] = frozenset()

    def __init__(self, root: gcs.Place):
        self._root = root
        self._inside: dict[str, dict[str, _Entry]] = {"": {}}
        for name, about in gcs.objects_below(root).items():
            *folders, file = name.split("/")
            for depth, folder in enumerate(folders):
                above = "/".join(folders[:depth])
                self._inside[above].setdefault(folder, _Entry(folder, "folder"))
                self._inside.setdefault("/".join(folders[: depth + 1]), {})
            if file:  # else an object that marks a folder
                mark = f"{about.size} {about.crc32c}"
                self._inside["/".join(folders)][file] = _Entry(file, "file", mark)

    def identity(self, name: str) -> Any:
        return name

    def is_overlay(self, name: str) -> bool:
        return False  # they are written to disks, and a look costs a request each

    def text(self, name: str) -> str:
        return (self._root / name).read_text()

    def entries(self, name: str) -> list[_Entry]:
        return list(self._inside[name].values())
