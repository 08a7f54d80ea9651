# SPDX-License-Identifier: Apache-2.0
"""The files below a directory, on disk or in a bucket, in as few requests as possible.

In a bucket one request lists up to 1,000 objects with their sizes. Contents are read, written and
deleted in parallel, one request each. Nothing is cached: another process may have written since.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

from localglobal_jax.checkpoints import store, workdir

T = TypeVar("T")
PARALLEL = 16  # requests at a time
AHEAD = 256 * 2**20  # bytes of files that are read before the first of them is used


@functools.lru_cache(1)
def _store() -> Any:
    """Returns gcsfs, without its cache. Raises ImportError without the extra ``gcs``."""
    import fsspec.config  # noqa: PLC0415 # part of the extra

    # gcsfs would ask for the type of every bucket, by gRPC, and warn where that is not permitted
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # also for `epath`, which orbax reads with
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    store.prepare()  # its retries, also where no path was checked before
    return fsspec.filesystem("gs")


def _parallel(do: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """Returns `do` of every name, in order; raises the first error after all have ended."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(do, names))


def sizes(directory: epath.Path) -> dict[str, int]:
    """Returns the size of every file below `directory`, by its path relative to it, sorted."""
    if not workdir.is_remote(directory):
        return {path: size for path, size in sorted(_on_disk(os.fspath(directory)))}
    bucket, _, key = os.fspath(directory).removeprefix("gs://").rstrip("/").partition("/")
    # By prefix: for an empty directory gcsfs.find(directory) lists those with a longer name too.
    found = _store().find(bucket, prefix=f"{key}/", detail=True)
    within = len(f"{bucket}/{key}/")
    return {
        name[within:]: about["size"]
        for name, about in sorted(found.items())
        if not name.endswith("/")  # the marker of an empty folder
    }


def folders(directory: epath.Path) -> list[str]:
    """Returns the names of the folders in `directory`, sorted; [] if it cannot be listed."""
    try:
        if not workdir.is_remote(directory):
            return sorted(path.name for path in directory.iterdir() if path.is_dir())
        bucket, _, key = os.fspath(directory).removeprefix("gs://").rstrip("/").partition("/")
        found = _store().ls(f"{bucket}/{key}", detail=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in found
             if entry["type"] == "directory")  # fmt: skip
    return sorted(names)


def _on_disk(directory: str) -> Iterator[tuple[str, int]]:
    for folder, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a run deletes its old checkpoints
                yield os.path.relpath(path, directory), os.stat(path).st_size


def contents(directory: epath.Path, files: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """Yields name and bytes of `files` (sizes by name, see `sizes`) below `directory`.

    Raises FileNotFoundError for a file that is gone.
    """
    if not workdir.is_remote(directory):
        for name in files:
            yield name, (directory / name).read_bytes()
        return
    groups, total = [list[str]()], 0
    for name, size in files.items():
        if groups[-1] and total + size > AHEAD:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    for group in groups:
        paths = [os.fspath(directory / name) for name in group]
        yield from zip(group, _parallel(_store().cat_file, paths), strict=True)


def modified(directory: epath.Path, name: str) -> float:
    """Returns the time of the last change of a file below `directory`, in seconds since 1970."""
    if not workdir.is_remote(directory):
        return os.stat(directory / name).st_mtime
    return _store().modified(os.fspath(directory / name)).timestamp()


def write(directory: epath.Path, files: Mapping[str, bytes]) -> None:
    """Writes objects below `directory`, in a bucket. Each is there whole or not at all."""
    _parallel(lambda name: _store().pipe_file(os.fspath(directory / name), files[name]), files)


def upload(directory: epath.Path, source: pathlib.Path, names: Iterable[str]) -> None:
    """Writes files below `source` as objects below `directory`, in a bucket."""
    _parallel(lambda name: _store().put_file(source / name, os.fspath(directory / name)), names)


def delete(directory: epath.Path, names: Iterable[str]) -> None:
    """Deletes objects below `directory`, in a bucket; those that are gone are no error."""

    def one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            _store().rm_file(os.fspath(directory / name))

    _parallel(one, names)


def delete_all(directory: epath.Path, first: Sequence[str] = ()) -> None:
    """Deletes everything below `directory`, in a bucket: the objects `first` before the others."""
    names = sizes(directory)
    for name in first:
        delete(directory, {name} & names.keys())
    delete(directory, names.keys() - first)


def move(directory: epath.Path, target: epath.Path, first: Sequence[str] = ()) -> None:
    """Moves everything below `directory` to `target`, in a bucket; replaces what is there.

    A bucket has no rename: the store copies every object, then they are deleted, `first` before
    the others. After a kill the call can be repeated.
    """
    names, copy = sizes(directory), _store().cp_file
    _parallel(lambda n: copy(os.fspath(directory / n), os.fspath(target / n)), names)
    delete(target, sizes(target).keys() - names.keys())
    delete_all(directory, first)
