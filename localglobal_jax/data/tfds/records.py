# SPDX-License-Identifier: Apache-2.0
"""Opens a split of a prepared TFDS data set and reads its records at random, values undecoded.

The data directory is local or on ``gs://``. Everything that can be wrong with its files is said
here: no such data set, not prepared, wrong format, damaged files, damaged records.
"""

import bisect
import contextlib
import difflib
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from localglobal_jax.checkpoints import store
from localglobal_jax.data.tfds import builders, gcs, tfrecord_index, trust
from localglobal_jax.data.tfds.array_records import ArrayRecordFiles
from localglobal_jax.data.tfds.tfrecord_files import DamagedRecord, TFRecordFiles

log = logging.getLogger(__name__)

TFRECORD = tfds.core.FileFormat.TFRECORD
INFO = trust.INFO
NAME = re.compile(
    r"(\w{1,100})(/[\w.+@-]{1,100})?(:[\d.*]{1,20})?"
)  # of a set, a config, a version
# Seconds between two listings of a data set in a bucket, to see whether a shard was replaced. One
# costs a request per 5,000 files.
LISTED_EVERY = 300


class BadRecord(ValueError):
    """A record that cannot be read or decoded; the message names the file and the index."""


def data_root(directory: str | None, name: str = "data.dir, or $TFDS_DATA_DIR") -> str:
    """Returns the TFDS directory: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises ValueError, which says that ``name`` gave it, unless it is a local path or
    ``gs://BUCKET/PATH``.
    """
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = os.path.expanduser(directory or default)
    try:
        if gcs.is_bucket(root):
            store.check_path(root)
            return root.rstrip("/")
    except ValueError as error:  # another store, no path in a bucket, or an ambiguous one
        raise ValueError(f"the data directory ({name}): {error}") from None
    if "://" in root or "\0" in root or root.startswith("~"):
        raise ValueError(
            f"the data directory {root!r} ({name}): give a local path or gs://BUCKET/PATH"
        )
    return os.path.abspath(root)


def find_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of ``name`` (``name[/config][:version]``), prepared or not.

    Raises ValueError for a name, config or version that does not exist, for a bucket that does not,
    and for a description in its files that is damaged, or names code that is not TFDS's own.
    """
    root = data_root(data_dir)
    if not (parts := NAME.fullmatch(name)):  # TFDS reads addresses and options into such names
        raise ValueError(
            f"{name!r} is not a name of a TFDS data set: want NAME, NAME/CONFIG, NAME:VERSION or "
            "NAME/CONFIG:VERSION"
        )
    if gcs.is_bucket(root):
        gcs.check_bucket(root)
    try:
        with trust.trusted(gcs.place(root) / parts[1]):
            builder = tfds.builder(name, data_dir=root)
            if builder.name != parts[1]:
                raise ValueError(f"it describes itself as {builder.name!r}")
            return builder
    except tfds.core.DatasetNotFoundError:
        raise ValueError(_unknown(name)) from None
    except AssertionError as error:  # how TFDS reports an unknown version
        raise ValueError(str(error)) from None


def _unknown(name: str) -> str:
    known = {*tfds.list_builders(with_community_datasets=False), *builders.BUILDERS}
    stem = name.partition("/")[0].partition(":")[0]
    near = difflib.get_close_matches(stem, sorted(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets/catalog"
    return (
        f'no TFDS data set is named "{name}": {hint} '
        "(a few, such as wmt14_translate, are only known where TensorFlow is installed)"
    )


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Returns whether it is prepared: its description is written last, or by one rename."""
    return (builder.data_path / INFO).exists()


def missing(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the message for a data set that is not prepared: where it was sought, what to run."""
    name = _asked_name(builder)
    root = builder.data_path.parents[len(name.split("/"))]
    usual = None
    with contextlib.suppress(ValueError):  # a wrong $TFDS_DATA_DIR, which was not used
        usual = data_root(None)
    where = "" if str(root) == usual else f" --dir {shlex.quote(str(root))}"
    others = _prepared_versions(builder.data_path.parent)
    hint = f' (there is "{name}:{others[-1]}", if that version will do)' if others else ""
    return (
        f'data set "{name}" is not prepared: looked in {builder.data_dir}{hint}. '
        f"Run `localglobal prepare {name}{where}` (or `localglobal prepare --config FILE` with "
        "the config of the run), or set data.dir to the directory that holds it"
    )


def _prepared_versions(folder: Any) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir() if (path / INFO).exists())
    return []


def _asked_name(builder: tfds.core.DatasetBuilder) -> str:
    config = builder.builder_config
    return f"{builder.name}/{config.name}" if config else builder.name


class Records:
    """The records of one split. ``split`` may be a part of one, as in ``"train[:90%]"``."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self.info = builder.info
        self.split = split
        self._mock, self._parts = None, []
        indexed = is_prepared(builder) and self.info.file_format is TFRECORD
        try:
            if not indexed:
                source = builder.as_data_source(split, file_format="array_record")
            if self.info.splits:
                self._parts = self.info.splits[split].file_instructions
            else:  # TFDS's mock data knows no splits and has no files
                self._mock = source.data_source
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ValueError(_why_not(builder, split, error)) from error
        opened = _open_tfrecord if indexed else ArrayRecordFiles
        self._files = opened(self._parts, gcs.place(builder.data_dir))
        self._ends = [0]
        for part in self._parts:
            self._ends.append(self._ends[-1] + part.take)
        self._listed = time.monotonic()

    def __len__(self) -> int:
        return self._ends[-1] if self._mock is None else len(self._mock)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns feature name -> bytes, a number or a list of either.

        Raises `BadRecord`; ValueError if the files have changed since they were opened.
        """
        if self._mock is not None:
            return self._mock[index]
        try:
            (raw,) = self._files.read([self._place(index)])
        except RuntimeError as error:
            self._check_unchanged()
            raise self.bad(index, error) from error
        found = self._parsed(index, raw)
        if isinstance(found, BadRecord):
            raise found
        return found

    def block(self, indices: Sequence[int]) -> list[Mapping[str, Any] | BadRecord]:
        """Returns many records at once, far cheaper than singly; a bad one as its error."""
        if time.monotonic() - self._listed > LISTED_EVERY:
            self._check_unchanged()
        if self._mock is None:  # mock data can only be had one by one
            with contextlib.suppress(RuntimeError):
                raws = self._files.read([*map(self._place, indices)])
                return [self._parsed(*one) for one in zip(indices, raws, strict=True)]
        return [self._get(index) for index in indices]

    def _get(self, index: int) -> Mapping[str, Any] | BadRecord:
        try:
            return self[index]
        except BadRecord as error:
            return error

    def _parsed(self, index: int, raw: bytes | DamagedRecord) -> Mapping[str, Any] | BadRecord:
        if isinstance(raw, DamagedRecord):
            return self.bad(index, raw)
        try:
            return _parse(raw)
        except DecodeError as error:
            self._check_unchanged()
            return self.bad(index, error)

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the number of a record's file, and the record's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index) - 1
        return file, index - self._ends[file] + self._parts[file].skip

    def _check_unchanged(self) -> None:
        """Raises ValueError if a file of a bucket was replaced since it was opened."""
        self._listed = time.monotonic()
        if change := self._files.changed():
            raise ValueError(
                f"{change}. This run was reading it, and its batches are no longer what they were: "
                "restore the file and continue, or start the run again in a new workdir"
            )

    def bad(self, index: int, why: Any) -> BadRecord:
        """Returns the error that names record ``index`` of this split and its place in the file."""
        at = f"record {index} of {self.info.full_name} {self.split}"
        if self._mock is None:
            file, place = self._place(index)
            at += f" (record {place} of {self._parts[file].filename})"
        return BadRecord(
            f"{at} is corrupt: {why}. Prepare the data set again, or skip a few such records "
            "with data.max_bad_records"
        )


def _open_tfrecord(parts: Sequence[Any], folder: gcs.Place) -> TFRecordFiles:
    """Opens the files of a set that TFDS left as TFRecord."""
    try:
        return TFRecordFiles(parts, folder)
    except tfrecord_index.NoIndex as error:
        raise ValueError(
            f"{error}, and TFRecord cannot be read at random without one. Make it by "
            f"{tfrecord_index.command(str(folder))}, which reads the files once. Or run "
            f"`localglobal prepare --from_tfrecord {folder} --dir NEW` to write an array_record "
            "twin below NEW, and set data.dir to NEW"
        ) from error


def _parse(raw: bytes) -> Mapping[str, Any]:
    """Returns the features of a serialized example; TFDS's own parser is 20 times slower."""
    values = {}
    for key, feature in tf_example_pb2.Example.FromString(raw).features.feature.items():
        kind = feature.WhichOneof("kind")
        items = getattr(feature, kind).value if kind else []
        values[key] = items[0] if len(items) == 1 else list(items)
    return values


def _why_not(builder: tfds.core.DatasetBuilder, split: str, error: Exception) -> str:
    """Returns the reason why TFDS could not open a split."""
    if not is_prepared(builder):
        return missing(builder)
    if isinstance(error, NotImplementedError):
        return (
            f"{builder.data_dir} was prepared as {builder.info.file_format.value}, which cannot be "
            "read at random: want array_record, or tfrecord with an index. Delete it and run "
            f"`localglobal prepare {_asked_name(builder)}`"
        )
    splits = list(builder.info.splits)
    near = difflib.get_close_matches(split, splits, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    what = f'split "{split}" of {builder.info.full_name} (data.train_split, data.eval_splits)'
    return f"{what}: {error}. It has {splits}.{hint}"


class BadRecordBudget:
    """Counts bad records, each once, and raises at the first beyond ``limit``. Thread-safe."""

    def __init__(self, limit: int):
        self.limit = limit
        self.seen: set[int] = set()
        self._lock = threading.Lock()

    def admit(self, index: int, error: BadRecord) -> None:
        """Notes that ``index`` is bad and logs it the first time."""
        with self._lock:
            if index in self.seen:
                return
            if len(self.seen) >= self.limit:
                raise error
            self.seen.add(index)
            log.warning("skipped (%d of at most %d): %s", len(self.seen), self.limit, error)
