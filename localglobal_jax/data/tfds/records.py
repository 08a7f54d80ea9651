# SPDX-License-Identifier: Apache-2.0
"""Opens a split of a prepared TFDS data set and reads its records at random, values undecoded.

Everything that can be wrong with files on disk is said here: no such data set, not prepared, wrong
format, damaged files, damaged records. `array_record` itself stays silent about a file cut short
(it counts zero records and fails later), hence the check of every file's count when it is opened.
"""

import bisect
import concurrent.futures
import contextlib
import difflib
import logging
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from localglobal_jax.data.tfds import builders, trust

log = logging.getLogger(__name__)

INFO = "dataset_info.json"  # TFDS's description of a prepared version
NAME = re.compile(
    r"(\w{1,100})(/[\w.+@-]{1,100})?(:[\d.*]{1,20})?"
)  # of a set, a config, a version
CHECKING_THREADS = 32  # opening a file waits for the disk, not for the processor


class BadRecord(ValueError):
    """A record that cannot be read or decoded; the message names the file and the index."""


def data_root(directory: str | None) -> str:
    """Returns the TFDS directory: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = os.path.expanduser(directory or default)
    if "://" in root or "\0" in root or root.startswith("~"):
        raise ValueError(
            f"the data directory {root!r} (data.dir, or $TFDS_DATA_DIR) is not a local directory: "
            "give a path on this machine, or mount the store"
        )
    return os.path.abspath(root)


def find_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of ``name`` (``name[/config][:version]``), prepared or not.

    Raises ValueError for a name, config or version that does not exist, and for a description on
    disk that is damaged, or names code that is not TFDS's own.
    """
    root = data_root(data_dir)
    if not (parts := NAME.fullmatch(name)):  # TFDS reads addresses and options into such names
        raise ValueError(
            f"{name!r} is not a name of a TFDS data set: want NAME, NAME/CONFIG, NAME:VERSION or "
            "NAME/CONFIG:VERSION"
        )
    try:
        with trust.trusted(pathlib.Path(root, parts[1])):
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
    """Returns whether it is prepared: TFDS writes the whole directory in one rename."""
    return (builder.data_path / INFO).exists()


def missing(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the message for a data set that is not prepared: where it was sought, what to run."""
    name = _asked_name(builder)
    root = builder.data_path.parents[len(name.split("/"))]
    where = "" if str(root) == data_root(None) else f" --dir {root}"
    others = sorted(path.parent.name for path in builder.data_path.parent.glob(f"*/{INFO}"))
    hint = f' (there is "{name}:{others[-1]}", if that version will do)' if others else ""
    return (
        f'data set "{name}" is not prepared: looked in {builder.data_dir}{hint}. '
        f"Run `localglobal prepare {name}{where}` (or `localglobal prepare --config FILE` with "
        "the config of the run), or set data.dir to the directory that holds it"
    )


def _asked_name(builder: tfds.core.DatasetBuilder) -> str:
    config = builder.builder_config
    return f"{builder.name}/{config.name}" if config else builder.name


def check_files(instructions: Sequence[Any], directory: pathlib.Path) -> None:
    """Raises ValueError for the first file that is missing or holds another number of records.

    ``instructions``: TFDS's, each with ``filename`` and ``examples_in_shard``; ``directory``: that
    of the data set, where all of them have to be.
    """
    trust.refuse_elsewhere([one.filename for one in instructions], directory)

    def check(instruction: Any) -> str | None:
        path, expected = instruction.filename, instruction.examples_in_shard
        if not os.path.exists(path):
            return f"{path} is missing"
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        found, why = reader.num_records(), ""
        try:
            reader.close()
        except RuntimeError as error:
            why = f" ({error})"
        if found == expected:
            return None
        return f"{path} holds {found} readable records instead of {expected}: damaged{why}"

    with concurrent.futures.ThreadPoolExecutor(CHECKING_THREADS) as pool:
        for problem in pool.map(check, instructions):
            if problem:
                raise ValueError(f"{problem}. Delete {directory} and prepare the data set again")


class Records:
    """The records of one split. ``split`` may be a part of one, as in ``"train[:90%]"``."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self.info = builder.info
        self.split = split
        try:
            source = builder.as_data_source(split, file_format="array_record")
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ValueError(_why_not(builder, split, error)) from error
        # TFDS's mock data knows no splits and has no files.
        self._files = self.info.splits[split].file_instructions if self.info.splits else []
        check_files(self._files, pathlib.Path(builder.data_dir))
        self._ends = [0]
        for file in self._files:
            self._ends.append(self._ends[-1] + file.take)
        self._raw = source.data_source  # serialized examples; TFDS's own parser is 20 times slower

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns feature name -> bytes, a number or a list of either. Raises `BadRecord`."""
        try:
            return _parse(self._raw[index])
        except (RuntimeError, DecodeError) as error:
            raise self.bad(index, error) from error

    def block(self, indices: Sequence[int]) -> list[Mapping[str, Any] | BadRecord]:
        """Returns many records at once, far cheaper than singly; a bad one as its error."""
        if self._files:  # mock data can only be had one by one
            with contextlib.suppress(RuntimeError, DecodeError):
                return [_parse(raw) for raw in self._raw.__getitems__(list(indices))]
        return [self._get(index) for index in indices]

    def _get(self, index: int) -> Mapping[str, Any] | BadRecord:
        try:
            return self[index]
        except BadRecord as error:
            return error

    def bad(self, index: int, why: Any) -> BadRecord:
        """Returns the error that names record ``index`` of this split and its place in the file."""
        at = f"record {index} of {self.info.full_name} {self.split}"
        if self._files:
            number = bisect.bisect_right(self._ends, index) - 1
            file = self._files[number]
            at += f" (record {index - self._ends[number] + file.skip} of {file.filename})"
        return BadRecord(
            f"{at} is corrupt: {why}. Prepare the data set again, or skip a few such records "
            "with data.max_bad_records"
        )


def _parse(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, bytes):
        return raw  # TFDS's mock data comes parsed
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
            f"read at random. Run `localglobal prepare --from_tfrecord {builder.data_dir} "
            "--dir NEW` to write its array_record twin below NEW, and set data.dir to NEW"
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
