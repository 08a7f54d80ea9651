# SPDX-License-Identifier: Apache-2.0
"""Prepares data sets through TFDS as array_record, and verifies them.

Killed at any moment, an attempt leaves at most directories named ``incomplete.*``; the next one
removes them. TFDS renames a finished directory into place, so a version is there whole or not at
all. Attempts exclude each other by a lock, because the hosts of a pod may all start by preparing.
"""

import concurrent.futures
import contextlib
import fcntl
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from localglobal_jax.data.tfds import records, trust
from localglobal_jax.data.tfds.builders import BUILDERS, RAW_FILES
from localglobal_jax.data.tfds.records import INFO
from localglobal_jax.data.tfds.tfrecord import read_tfrecord

log = logging.getLogger(__name__)

FORMAT = "array_record"
INCOMPLETE = "incomplete."  # TFDS's own prefix for directories it has not finished
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
    with _alone(pathlib.Path(root, builder.name)) as staging:
        if not records.is_prepared(builder):
            _make(builder, root, source, staging)
    builder = records.find_builder(name, root)
    return {**verify(builder), **(builder.info.metadata or {}).get("counts", {})}


def _config(builder: tfds.core.DatasetBuilder) -> str:
    return builder.builder_config.name if builder.builder_config else ""


def verify(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Returns split -> records, counted in every file. Raises ValueError for damaged files."""
    if not records.is_prepared(builder):
        raise ValueError(records.missing(builder))
    return {split: len(records.Records(builder, split)) for split in builder.info.splits}


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context manager that locks ``directory``, sweeps it, and yields a directory for downloads.

    The lock is one of the kernel's, so it ends with its process, however that ends.
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
            _sweep(directory)
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


def _sweep(directory: pathlib.Path) -> None:
    """Removes files of killed attempts. Needs the lock: a live attempt looks the same."""
    for leftover in list(directory.rglob(f"{INCOMPLETE}*")):
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
            f"could not prepare {builder.name} in {builder.data_dir}: {error}. Without internet "
            "access, name a directory with its raw files: --source DIR"
        ) from error


def from_tfrecord(directory: str, data_dir: str | None = None) -> dict[str, int]:
    """Writes the array_record twin of a TFDS directory prepared as TFRecord: split -> records.

    ``directory``: the one with `dataset_info.json`. The twin goes to its standard place under
    ``data_dir``; its records are the same bytes in the same order, shard by shard.
    """
    origin = pathlib.Path(directory).expanduser().resolve()
    if not (origin / INFO).is_file():
        raise ValueError(
            f"{directory} has no {INFO}: give the version directory of a TFDS data set, such as "
            "~/tensorflow_datasets/cifar10/3.0.2"
        )
    builder = trust.open_directory(origin)
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(f"{directory} holds {builder.info.file_format.value}, not tfrecord")
    root = pathlib.Path(records.data_root(data_dir))
    target = root.joinpath(*builder.info.full_name.split("/"))
    if target.resolve() == origin:
        raise ValueError(f"the twin of {origin} needs another data directory: give another --dir")
    with _alone(root / builder.name):
        if not (target / INFO).exists():
            _refuse_remains(target)
            _convert(builder, origin, target)
    return verify(trust.open_directory(target))


def _convert(builder: tfds.core.DatasetBuilder, origin: pathlib.Path, target: pathlib.Path) -> None:
    """Writes shard by shard into a temporary directory beside ``target``, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=INCOMPLETE, dir=target.parent) as scratch:
        made = pathlib.Path(scratch, target.name)
        made.mkdir()
        shards = []
        for name, split in builder.info.splits.items():
            for i, (path, length) in enumerate(
                zip(split.filepaths, split.shard_lengths, strict=True)
            ):
                shard = f"{i:05d}-of-{len(split.shard_lengths):05d}"
                shards.append((path, length, made / f"{builder.name}-{name}.{FORMAT}-{shard}"))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda shard: _convert_shard(*shard), shards))
        for path in origin.iterdir():  # features.json, label names
            if path.is_file() and ".tfrecord" not in path.name:
                shutil.copy(path, made)
        info = json.loads((origin / INFO).read_text())
        info.pop("alternativeFileFormats", None)
        info["fileFormat"] = FORMAT
        for entry in info["splits"]:
            entry["filepathTemplate"] = SHARD_NAME
        (made / INFO).write_text(json.dumps(info, indent=2))
        made.rename(target)


def _convert_shard(path: os.PathLike, length: int, target: pathlib.Path) -> None:
    writer = array_record_module.ArrayRecordWriter(str(target), "group_size:1")
    count = 0
    try:
        for record in read_tfrecord(os.fspath(path)):
            writer.write(record)
            count += 1
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    finally:
        writer.close()
    if count != length:
        raise ValueError(f"{path} holds {count} records, its {INFO} says {length}")
