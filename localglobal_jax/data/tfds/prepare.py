# SPDX-License-Identifier: Apache-2.0
"""Prepares data sets through TFDS as array_record, and verifies them.

On disk: killed at any moment, an attempt leaves at most directories named ``incomplete.*``. The
next one removes them, or goes on with its own. A finished directory is renamed into place, so a
version is there whole or not at all. Attempts exclude each other by a lock, because the hosts of a
pod may all start by preparing.

In a bucket there is no lock, and no rename: writes are idempotent. Attempts write the same bytes
under the same names, an object appears when it is whole, one that is there with these bytes is not
written again, and the description, without which a version does not count, is written last.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from localglobal_jax.data.tfds import gcs, records, trust
from localglobal_jax.data.tfds.builders import BUILDERS, RAW_FILES
from localglobal_jax.data.tfds.records import INFO
from localglobal_jax.data.tfds.tfrecord import read_tfrecord

log = logging.getLogger(__name__)

FORMAT = "array_record"
INCOMPLETE = "incomplete."  # TFDS's own prefix for directories it has not finished
SOURCE = "localglobal-source"  # metadata of an object: the `_Shard.identity` it was made of
SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default


def prepare(name: str, data_dir: str | None = None, source: str | None = None) -> dict[str, int]:
    """Prepares TFDS data set ``name``, or only verifies it where it is there: split -> records.

    After the splits come the counts of its builder, such as left-out records and the reasons.
    ``source``: a directory with the raw files, where they cannot be downloaded: the IDX files of
    fashion_mnist, or the manual directory of TFDS (imagenet2012). Raises ValueError where
    the data set cannot be downloaded or contradicts its description.
    """
    root = records.data_root(data_dir)
    builder = records.find_builder(name, root)
    if source is not None and not os.path.isdir(source):
        raise ValueError(f"the source directory {source} does not exist")
    if builder.name in RAW_FILES and source is not None:
        RAW_FILES[builder.name].locate(source, _config(builder))
    if not gcs.is_bucket(root):
        with _alone(pathlib.Path(root, builder.name)) as staging:
            if records.is_prepared(builder):
                _say_that_it_is_there(builder.data_dir)
            else:
                _make(builder, root, source, staging)
    elif records.is_prepared(builder):
        _say_that_it_is_there(builder.data_dir)
    else:
        _make_in_bucket(name, builder.data_dir, source)
    builder = records.find_builder(name, root)
    return {**verify(builder), **(builder.info.metadata or {}).get("counts", {})}


def _say_that_it_is_there(target: Any) -> None:
    log.info("%s is there already: its files are checked, nothing is written", target)


def _config(builder: tfds.core.DatasetBuilder) -> str:
    return builder.builder_config.name if builder.builder_config else ""


def verify(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Returns split -> records, counted in every file. Raises ValueError for damaged files."""
    if not records.is_prepared(builder):
        raise ValueError(records.missing(builder))
    return {split: len(records.Records(builder, split)) for split in builder.info.splits}


def _make_in_bucket(name: str, target: str, source: str | None) -> None:
    """Prepares a data set in a temporary directory, and copies its files to ``target``."""
    with tempfile.TemporaryDirectory(prefix="localglobal-") as scratch:
        prepare(name, scratch, source)
        made = pathlib.Path(records.find_builder(name, scratch).data_dir)
        log.info("writing to %s", target)
        gcs.upload(sorted(path for path in made.iterdir() if path.name != INFO), target)
        gcs.upload([made / INFO], target)


@contextlib.contextmanager
def _alone(directory: pathlib.Path, keep: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Context manager that locks ``directory``, sweeps it, and yields a directory for downloads.

    The lock is one of the kernel's, so it ends with its process, however that ends. ``keep``: what
    a killed attempt left and this one goes on with.
    """
    existed = directory.is_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ValueError(
            f"cannot make {directory} ({error.strerror}): choose another data directory with "
            "data.dir or --dir"
        ) from error
    staging = directory / f"{INCOMPLETE}{os.getpid()}_downloads"
    try:
        if _lock(handle, directory):
            _sweep(directory, keep)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(handle)
        if not existed:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only where it stayed empty


def _lock(handle: int, directory: pathlib.Path) -> bool:
    """Waits for the lock; returns False where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that prepares %s", directory)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        log.warning("%s cannot be locked: prepare from one process at a time", directory)
        return False
    return True


def _sweep(directory: pathlib.Path, keep: pathlib.Path | None) -> None:
    """Removes files of killed attempts. Needs the lock: a live attempt looks the same."""
    for leftover in list(directory.rglob(f"{INCOMPLETE}*")):
        if leftover == keep:
            continue
        log.info("removing what a killed attempt left: %s", leftover)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _refuse_remains(directory: pathlib.Path) -> None:
    if directory.exists():
        raise ValueError(f"{directory} exists but has no {INFO}: delete it, or restore that file")


def _make(
    builder: tfds.core.DatasetBuilder, root: str, source: str | None, staging: pathlib.Path
) -> None:
    """Writes the data set. TFDS's output goes to stderr, because stdout may be JSON.

    Of ours it prints only sizes that it does not know.
    """
    _refuse_remains(pathlib.Path(builder.data_dir))
    if builder.name in RAW_FILES:
        config = _config(builder)
        source = source or RAW_FILES[builder.name].find(config, staging)
        builder = BUILDERS[builder.name](data_dir=root, config=config or None, source=source)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=source, try_download_gcs=False)
    printed = io.StringIO() if builder.name in BUILDERS else sys.stderr
    log.info("preparing %s", builder.data_dir)
    try:
        with contextlib.redirect_stdout(printed):
            builder.download_and_prepare(
                file_format=FORMAT,
                download_config=config,
                download_dir=staging if builder.name in BUILDERS else None,
            )
    except ImportError as error:
        raise ValueError(
            f"preparing {builder.name} needs a package that is not here ({error}). "
            'Install TensorFlow for this step, `pip install "localglobal_jax[tf]"`, or convert a '
            "directory prepared elsewhere with `localglobal prepare --from_tfrecord DIR`"
        ) from error
    except (AssertionError, OSError) as error:
        raise ValueError(
            f"could not prepare {builder.name}: {error}. Without internet access, "
            "name a directory with its raw files: --source DIR"
        ) from error


# ------------------------------------------------------------------------------- from TFRecord


class _Shard(NamedTuple):
    """A TFRecord file, the number of its records, and the name of the file made of it."""

    path: Any
    length: int
    name: str
    identity: str  # changes when the file does


class _Target(Protocol):
    """Place of a data set that is made file by file; counts as prepared after `finish`."""

    def has(self, shard: _Shard) -> bool:
        """Returns whether an earlier attempt made this shard of the same file."""

    def add(self, shard: _Shard) -> None:
        """Converts a shard. Raises ValueError for a damaged one."""

    def finish(self, shards: list[_Shard], files: dict[str, bytes]) -> None:
        """Adds the other files, with the description, after all shards."""


def from_tfrecord(directory: str, data_dir: str | None = None) -> dict[str, int]:
    """Writes the array_record twin of a TFDS directory prepared as TFRecord: split -> records.

    ``directory``: the one with `dataset_info.json`, local or on ``gs://``, as ``data_dir`` is. The
    twin goes to its standard place under ``data_dir``; its records are the same bytes in the same
    order, shard by shard. An attempt goes on where one before was ended: it makes the shards that
    are missing, or whose TFRecord file has changed since. A bucket's shards need temporary space
    for as many of them as are made at a time.
    """
    origin = _origin(directory)
    builder = trust.open_directory(origin)
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(f"{directory} holds {builder.info.file_format.value}, not tfrecord")
    root = gcs.place(records.data_root(data_dir))
    target = root.joinpath(*builder.info.full_name.split("/"))
    if target == origin or (not gcs.is_bucket(target) and target.resolve() == origin):
        raise ValueError(f"the twin of {origin} needs another data directory: give another --dir")
    if gcs.is_bucket(root):
        gcs.check_bucket(root)
        if INFO in gcs.listing(target):
            _say_that_it_is_there(target)
        else:
            with tempfile.TemporaryDirectory(prefix="localglobal-") as scratch:
                _convert(builder, origin, _InBucket(target, pathlib.Path(scratch)))
    else:
        staging = target.with_name(f"{INCOMPLETE}{target.name}.{FORMAT}")
        with _alone(root / builder.name, keep=staging):
            if (target / INFO).exists():
                _say_that_it_is_there(target)
            else:
                _refuse_remains(target)
                try:
                    _convert(builder, origin, _OnDisk(target, staging))
                finally:
                    with contextlib.suppress(OSError):
                        staging.rmdir()  # only where it stayed empty
    return verify(trust.open_directory(target))


def _origin(directory: str) -> Any:
    """Returns the path of a prepared version. Raises ValueError where there is none."""
    if gcs.is_bucket(directory):
        gcs.check_bucket(directory)
        origin = gcs.place(directory.rstrip("/"))
    else:
        origin = pathlib.Path(directory).expanduser().resolve()
    if not (origin / INFO).exists():
        raise ValueError(
            f"{directory} has no {INFO}: give the version directory of a TFDS data set, such as "
            "~/tensorflow_datasets/cifar10/3.0.2"
        )
    return origin


def _convert(builder: tfds.core.DatasetBuilder, origin: Any, target: _Target) -> None:
    shards = _shards(builder, origin)
    missing = [shard for shard in shards if not target.has(shard)]
    log.info("converting %d of %d shards of %s", len(missing), len(shards), origin)
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        for done in [pool.submit(target.add, shard) for shard in missing]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error no more shards are begun
    files = _other_files(origin)  # features.json, label names
    info = json.loads(files[INFO])
    info.pop("alternativeFileFormats", None)
    info["fileFormat"] = FORMAT
    for entry in info["splits"]:
        entry["filepathTemplate"] = SHARD_NAME
    target.finish(shards, files | {INFO: json.dumps(info, indent=2).encode()})


def _shards(builder: tfds.core.DatasetBuilder, origin: Any) -> list[_Shard]:
    there = gcs.listing(origin) if gcs.is_bucket(origin) else {}

    def identity(path: Any) -> str:
        if (stored := there.get(path.name)) is not None:
            state = f"{stored.size} {stored.generation}"
        elif not gcs.is_bucket(path) and path.exists():
            state = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        else:
            raise ValueError(f"{path} is missing: prepare the TFRecord data set again")
        return hashlib.sha256(f"{path} {state}".encode()).hexdigest()[:16]

    shards = []
    for split, info in builder.info.splits.items():
        for i, (file, length) in enumerate(zip(info.filepaths, info.shard_lengths, strict=True)):
            number = f"{i:05d}-of-{len(info.shard_lengths):05d}"
            path, name = gcs.place(file), f"{builder.name}-{split}.{FORMAT}-{number}"
            shards.append(_Shard(path, length, name, identity(path)))
    return shards


def _other_files(origin: Any) -> dict[str, bytes]:
    if gcs.is_bucket(origin):
        paths = [origin / name for name in gcs.listing(origin)]
    else:
        paths = [path for path in origin.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if ".tfrecord" not in path.name}


class _OnDisk:
    """A directory that is filled beside ``target`` and then renamed."""

    def __init__(self, target: pathlib.Path, staging: pathlib.Path):
        self._target, self._staging = target, staging
        staging.mkdir(parents=True, exist_ok=True)

    def _file(self, shard: _Shard) -> pathlib.Path:
        return self._staging / f"{shard.name}.{shard.identity}"

    def has(self, shard: _Shard) -> bool:
        return self._file(shard).exists()

    def add(self, shard: _Shard) -> None:
        unfinished = self._staging / f"{INCOMPLETE}{shard.name}"
        _convert_shard(shard, unfinished)
        unfinished.rename(self._file(shard))
        shard_names = self._staging.glob(f"{shard.name}.*")
        for other in shard_names:  # made of a TFRecord file that has changed since
            if other != self._file(shard):
                other.unlink()

    def finish(self, shards: list[_Shard], files: dict[str, bytes]) -> None:
        for shard in shards:
            self._file(shard).rename(self._staging / shard.name)
        for name, content in files.items():
            (self._staging / name).write_bytes(content)
        for file in self._staging.iterdir():  # of an attempt that was ended here
            if file.name not in {*files, *(shard.name for shard in shards)}:
                file.unlink()
        self._staging.rename(self._target)


class _InBucket:
    """A folder of a bucket. Each shard passes through the directory ``scratch``."""

    def __init__(self, target: Any, scratch: pathlib.Path):
        self._target, self._scratch = target, scratch
        self._there = gcs.listing(target)

    def has(self, shard: _Shard) -> bool:
        stored = self._there.get(shard.name)
        return stored is not None and stored.metadata.get(SOURCE) == shard.identity

    def add(self, shard: _Shard) -> None:
        file = self._scratch / shard.name
        try:
            _convert_shard(shard, file)
            gcs.put(file, f"{self._target}/{shard.name}", **{SOURCE: shard.identity})
        finally:
            file.unlink(missing_ok=True)

    def finish(self, shards: list[_Shard], files: dict[str, bytes]) -> None:
        del shards  # they are there
        for name, content in files.items():
            (self._scratch / name).write_bytes(content)
        gcs.upload([self._scratch / name for name in files if name != INFO], self._target)
        gcs.upload([self._scratch / INFO], self._target)


def _convert_shard(shard: _Shard, target: pathlib.Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(target), "group_size:1")
    count = 0
    try:
        with gcs.named_in_errors(shard.path):
            for record in read_tfrecord(os.fspath(shard.path)):
                writer.write(record)
                count += 1
    finally:
        writer.close()
    if count != shard.length:
        raise ValueError(f"{shard.path} holds {count} records, its {INFO} says {shard.length}")
