# SPDX-License-Identifier: Apache-2.0
"""Data directories on Google Cloud Storage (``gs://BUCKET/PATH``): paths, listings, uploads.

Small files pass through `etils.epath`, whose file system for ``gs://`` is gcsfs; `array_record`
reads records itself. gcsfs caches listings for the life of a process, and other processes write
too, so the functions here drop its cache before they look.
"""

import base64
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import fsspec
import google_crc32c
from etils import epath
from etils.epath import backend

from localglobal_jax.checkpoints import store
from localglobal_jax.checkpoints.workdir import is_remote as is_bucket

Place: TypeAlias = pathlib.Path  # or an `epath.Path` on gs://, which has the same methods
UPLOADS = 8  # files sent at a time
CHUNK = 2**20  # bytes


class Stored(NamedTuple):
    """Object of a bucket, as a listing gives it. The generation changes with every write."""

    size: int
    generation: str
    crc32c: str  # of its bytes, in base64
    metadata: Mapping[str, str]


def place(path: str | epath.Path | pathlib.Path) -> Place:
    """Returns the path object of a local path or of one on ``gs://``.

    `epath` alone will not do: its local `glob` takes brackets in a directory's name for a pattern.
    """
    return epath.Path(path) if is_bucket(path) else pathlib.Path(path)


def filesystem(path: str | epath.Path) -> Any:
    """Returns the fsspec file system of `path`, the one that `epath` uses, with an empty cache."""
    try:
        found = backend.fsspec_backend.fs(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}: pip install 'localglobal_jax[gcs]'") from None
    found.invalidate_cache()
    return found


@contextlib.contextmanager
def named_in_errors(path: str | epath.Path) -> Iterator[None]:
    """Context manager that turns errors of gcsfs, google-auth and aiohttp into one line.

    They become an OSError where the same request may succeed later, else a ValueError. Errors that
    name the path already, of a missing file and of local files pass as they are.
    """
    try:
        yield
    except (FileNotFoundError, store.WrongCredentials):
        raise
    except store.StoreFailed as error:
        if error.is_final:
            raise ValueError(str(error)) from error
        raise
    except Exception as error:
        missing_extra = isinstance(error.__context__, ImportError)
        if missing_extra or str(path) in str(error) or not is_bucket(path):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f'{path} cannot be reached ({error}). Check the network and the credentials ("Data in '
            'buckets" in configs/data.md names their variables)'
        ) from error


def failure_behind(error: BaseException | None) -> store.StoreFailed | None:
    """Returns the error of the store that caused `error`; None where none did."""
    while error:
        if isinstance(error, store.StoreFailed):
            return error
        error = error.__cause__ or error.__context__
    return None


def raise_failure_behind(error: Exception) -> None:
    """Raises the error of the store that caused `error`, if any: a ValueError if it would stay."""
    failed = failure_behind(error)
    if failed and failed.is_final:
        raise ValueError(str(failed)) from error
    if failed:
        raise failed from None


def may_pass(error: Exception) -> bool:
    """Returns whether the same request may succeed later: not for what is missing or denied."""
    failed = failure_behind(error)
    return failed is not None and not failed.is_final


def check_bucket(path: str | epath.Path) -> None:
    """Raises ValueError unless the bucket of `path` exists and may be listed."""
    bucket, _, prefix = str(path).removeprefix("gs://").partition("/")
    with named_in_errors(path):
        filesystem(path).call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1)


def check_readable(path: str | epath.Path, patience: float | None = None) -> None:
    """Raises the error of the store, ValueError where it would stay, if `path` cannot be read.

    ``patience``: seconds of retries, if other than `store.LIMITS`.
    """
    files = filesystem(path) if patience is None else fsspec.filesystem("gs", patience=patience)
    with named_in_errors(path):
        try:
            files.cat_file(str(path), 0, 1)
        except Exception as error:
            if str(getattr(error, "code", "")) != "416":  # an empty object has no such range
                raise


def listing(folder: str | epath.Path) -> dict[str, Stored]:
    """Returns file name -> `Stored` of the objects directly in `folder`, as they are now."""
    try:
        with named_in_errors(folder):
            found = filesystem(folder).ls(str(folder), detail=True)
    except FileNotFoundError:
        return {}
    return {
        entry["name"].rpartition("/")[2]: _stored(entry)
        for entry in found
        if entry["type"] == "file"
    }


def _stored(entry: Mapping[str, Any]) -> Stored:
    return Stored(
        size=int(entry["size"]),
        generation=str(entry["generation"]),
        crc32c=entry.get("crc32c", ""),
        metadata=entry.get("metadata") or {},
    )


def find(folder: str | epath.Path, name: str, depth: int) -> list[epath.Path]:
    """Returns the objects called `name` in `folder` or at most ``depth - 1`` folders below it."""
    with named_in_errors(folder):
        found = filesystem(folder).find(str(folder), maxdepth=depth)
    return [epath.Path(f"gs://{path}") for path in found if path.rpartition("/")[2] == name]


def objects_below(folder: str | epath.Path) -> dict[str, Stored]:
    """Returns name below `folder` -> `Stored` of all objects below it, by one listing."""
    prefix = str(folder).removeprefix("gs://").rstrip("/") + "/"
    with named_in_errors(folder):
        found = filesystem(folder).find(str(folder), detail=True)
    return {name.removeprefix(prefix): _stored(entry) for name, entry in found.items()}


def crc32c(file: pathlib.Path) -> str:
    """Returns the CRC-32C of a local file, as a listing gives it."""
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            checksum.update(chunk)
    return base64.b64encode(checksum.digest()).decode()


def put(file: pathlib.Path, target: str, **metadata: str) -> None:
    """Writes a local file as the object `target`, which appears when it is whole."""
    with named_in_errors(target):
        filesystem(target).put_file(str(file), target, metadata=metadata or None)


def upload(files: Sequence[pathlib.Path], folder: str | epath.Path) -> None:
    """Writes local files to `folder`, except those that it has with the same bytes.

    Raises ValueError if the store then holds other bytes than were sent.
    """
    there = listing(folder)
    sums = {file.name: crc32c(file) for file in files}

    def send(file: pathlib.Path) -> None:
        old = there.get(file.name)
        if old is None or old.crc32c != sums[file.name]:
            put(file, f"{folder}/{file.name}")

    with concurrent.futures.ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(send, files))
    stored = listing(folder)
    for name, wanted in sums.items():
        if name not in stored or stored[name].crc32c != wanted:
            raise ValueError(
                f"{folder}/{name} does not hold the bytes that were sent: another process writes "
                "there, or the transfer was damaged. Run the command again"
            )
