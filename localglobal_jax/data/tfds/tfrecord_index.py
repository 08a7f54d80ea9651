# SPDX-License-Identifier: Apache-2.0
"""The index of a TFRecord data set: length and checksum of each record, so that any can be read.

TFRecord files have no table of their records. `make` reads every shard once and writes one file
beside the shards, or in `cache` where that place cannot be written. `load` returns the index only
if it describes the shards as they are now: every name, size, generation and number of records.

The file: `MAGIC`, the CRC-32C of the rest, the length of a JSON header and that header (names,
sizes, generations, counts), then per shard the lengths and the masked CRC-32Cs of its records as
little-endian uint32. A record lies behind the one before it, so the lengths give the offsets.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import struct
import time
import uuid
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from etils import epath

from localglobal_jax.data.tfds import gcs, ranges, tfrecord, trust

log = logging.getLogger(__name__)

NAME = "localglobal.tfrecord-index"
CACHE_VARIABLE = "LOCALGLOBAL_INDEX_DIR"
MAGIC = b"localglobal TFRecord index 1\n"
FIXED = struct.Struct("<IQ")  # CRC-32C of what follows it and the JSON header's length; that length
UINT32 = np.dtype("<u4")
SAVE_EVERY = 30  # seconds: what a killed `make` has to read again
THREADS_FOR_BUCKET = 32  # each waits for the network


class NoIndex(ValueError):
    """There is no index."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The records of one shard, and what the file was when it was read.

    Attributes:
      stat: size and generation of the file.
      crc: CRC-32C of the whole file.
      damaged: number of records whose data disagrees with their checksum.
      lengths, crcs: uint32 ``[records]``: bytes and masked CRC-32C of each record's data, the
        checksum as the file has it.
    """

    stat: ranges.Stat
    crc: int
    damaged: int
    lengths: np.ndarray
    crcs: np.ndarray

    def bounds(self) -> np.ndarray:
        """Returns int64 ``[records, 2]``: offsets of each record's data, and of its end."""
        ends = np.cumsum(self.lengths.astype(np.int64) + tfrecord.OVERHEAD) - tfrecord.FOOTER.size
        return np.stack([ends - self.lengths, ends], axis=1)


def command(directory: str) -> str:
    """Returns the command that makes the index of a directory."""
    return f"`localglobal prepare --index {directory}`"


def cache() -> epath.Path:
    """Returns the directory of indices whose data cannot be written: $LOCALGLOBAL_INDEX_DIR."""
    return epath.Path(
        os.path.expanduser(os.environ.get(CACHE_VARIABLE) or "~/.cache/localglobal/index")
    )


def places(directory: str) -> tuple[epath.Path, epath.Path]:
    """Returns the two paths of a directory's index: beside its data, and in `cache`."""
    real = directory if gcs.is_bucket(directory) else os.path.realpath(directory)
    key = hashlib.sha256(real.encode()).hexdigest()[:16]
    return epath.Path(directory) / NAME, cache() / f"{key}.{NAME}"


# ------------------------------------------------------------------------------------- reading


def load(directory: ranges.Directory, counts: Mapping[str, int]) -> dict[str, Shard]:
    """Returns file name -> `Shard` for the files in ``counts`` (file name -> records).

    Raises ValueError, which names the command that mends it, where there is no index, or each
    index found is damaged or of other files.
    """
    beside, cached = places(directory.path)
    stats = directory.stats()
    found = [beside] if NAME in stats else []
    if cached.exists():
        found.append(cached)
    if not found:
        raise NoIndex(f"{directory.path} has no index: neither {beside} nor {cached} exists")
    problems = []
    for path in found:
        try:
            return _matching(_read(path), stats, counts)
        except ValueError as error:
            problems.append(f"the index {path} {error}")
    raise ValueError(f"{'; '.join(problems)}. Make it again by {command(directory.path)}")


def _matching(
    shards: Mapping[str, Shard], stats: Mapping[str, ranges.Stat], counts: Mapping[str, int]
) -> dict[str, Shard]:
    for name, count in counts.items():
        if name not in stats:
            raise ValueError(f"cannot be used: {name} is missing")
        if name not in shards:
            raise ValueError(f"lacks {name}")
        if problem := _difference(shards[name].stat, stats[name]):
            raise ValueError(f"is of another {name}: {problem}")
        if (indexed := len(shards[name].lengths)) != count:
            raise ValueError(f"has {indexed} records of {name}, the data set says {count}")
    return {name: shards[name] for name in counts}


def _difference(then: ranges.Stat, now: ranges.Stat) -> str:
    """Returns how a file differs from what it was; "" if it does not."""
    if then.size != now.size:
        return f"its size was {then.size}, it is {now.size}"
    if then.generation != now.generation:
        return f"its generation was {then.generation}, it is {now.generation}"
    return ""


def _read(path: epath.Path) -> dict[str, Shard]:
    """Returns the shards of an index file. Raises ValueError for a damaged one."""
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("is damaged, or of another version: it begins with other bytes")
    body = content[len(MAGIC) :]
    if len(body) < FIXED.size or google_crc32c.value(body[4:]) != FIXED.unpack_from(body)[0]:
        raise ValueError("is damaged: its checksum differs")
    try:
        return _parse(body)
    except (ValueError, TypeError, RecursionError) as error:  # valid checksum, other content
        raise ValueError(f"is damaged: {error}") from None


def _parse(body: bytes) -> dict[str, Shard]:
    _, size = FIXED.unpack_from(body)
    header = json.loads(body[FIXED.size : FIXED.size + size])
    numbers = np.frombuffer(body, UINT32, offset=FIXED.size + size)
    shards, position = {}, 0
    for name, generation, length, crc, damaged, count in header:
        lengths, crcs = numbers[position : position + 2 * count].reshape(2, count)
        position += 2 * count
        if (total := int(lengths.sum(dtype=np.int64)) + count * tfrecord.OVERHEAD) != length:
            raise ValueError(f"the records of {name} take {total} of {length} bytes")
        shards[name] = Shard(ranges.Stat(length, generation), crc, damaged, lengths, crcs)
    return shards


def changed(
    directory: ranges.Directory, shards: Mapping[str, Shard], failed: int | None = None
) -> str | None:
    """Returns which file is not the indexed one any more, and how; None where all are.

    ``failed``: the number of a record that cannot be used, of the one shard given. A file replaced
    by hand may have the old size and time. So the frames of this record and of the first one are
    read: a frame that is whole, but of another length or checksum, is that of another record.
    """
    stats = directory.stats()
    for name, shard in shards.items():
        problem = _difference(shard.stat, stats[name]) if name in stats else "it was deleted"
        if failed is not None and not problem:
            problem = _other_record(directory, name, shard, failed)
        if problem:
            return f"{directory.path}/{name} is not the file that was indexed: {problem}"
    return None


def _other_record(directory: ranges.Directory, name: str, shard: Shard, record: int) -> str:
    for i in (record, 0):
        begin, end = shard.bounds()[i].tolist()
        frame = (name, begin - tfrecord.HEADER.size, end + tfrecord.FOOTER.size)
        (found,) = directory.read([frame])
        length = tfrecord.length_in(found[: tfrecord.HEADER.size])
        if length is None:
            continue
        data = found[tfrecord.HEADER.size : -tfrecord.FOOTER.size]
        (crc,) = tfrecord.FOOTER.unpack(found[-tfrecord.FOOTER.size :])
        if length != end - begin or tfrecord.masked_crc(data) == crc != int(shard.crcs[i]):
            return f"its record {i} is another"
    return ""


# -------------------------------------------------------------------------------------- making


def prepare(directory: str) -> dict[str, int]:
    """Writes the index of a TFDS directory prepared as TFRecord: split -> records.

    ``directory``: the one with `dataset_info.json`, local or on ``gs://``. Raises ValueError as
    `make`, and for a directory of another kind.
    """
    if gcs.is_bucket(directory):
        gcs.check_bucket(directory)
        folder = gcs.place(directory)
    else:
        folder = gcs.place(os.path.abspath(os.path.expanduser(directory)))
    splits = _splits(folder)
    counts = {
        os.path.basename(path): length
        for split in splits.values()
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
    }
    damaged = make(str(folder), counts)
    found = {name: split.num_examples for name, split in splits.items()}
    return {**found, **({"damaged records": damaged} if damaged else {})}


def _splits(folder: gcs.Place) -> Mapping[str, Any]:
    if not (folder / trust.INFO).exists():
        raise ValueError(f"{folder} has no {trust.INFO}: give the version directory of a data set")
    info = trust.open_directory(folder).info
    if info.file_format.value != "tfrecord":
        raise ValueError(f"{folder} holds {info.file_format.value}, not tfrecord")
    return info.splits


def make(path: str, counts: Mapping[str, int]) -> int:
    """Writes the index of the shards in ``counts`` (file name -> records) of a directory.

    Shards are read in parallel, in chunks. Those that an index already describes as they are now
    are not read again, so a killed attempt goes on where it was. Returns the number of records
    whose data disagrees with their checksum: reading them gives bad records. Raises ValueError for
    a shard that is missing, cut off, or holds another number of records.
    """
    directory = ranges.Directory(path)
    with contextlib.suppress(ValueError):
        known = load(directory, counts)
        log.info("the index of %s is up to date", directory.path)
        return sum(shard.damaged for shard in known.values())
    stats = directory.stats()
    if missing := sorted(counts.keys() - stats.keys()):
        raise ValueError(f"{directory.path}/{missing[0]} is missing")
    done = {name: shard for name, shard in _known(directory.path, stats) if name in counts}
    target = _writable(directory.path, done)
    partial = _partial(target)
    todo = [name for name in counts if name not in done]
    log.info("indexing %d of %d shards of %s", len(todo), len(counts), directory.path)
    threads = THREADS_FOR_BUCKET if gcs.is_bucket(directory.path) else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads, "index") as pool:
        futures = {
            pool.submit(_scan, directory, name, stats[name], counts[name]): name for name in todo
        }
        try:
            saved = time.monotonic()
            for future in concurrent.futures.as_completed(futures):
                done[futures[future]] = future.result()
                if time.monotonic() - saved > SAVE_EVERY:
                    _write(partial, done)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _write(partial, done)
            raise
    now = directory.stats()
    for name in counts:
        if name not in now or _difference(stats[name], now[name]):
            raise ValueError(f"{directory.path}/{name} was written while it was indexed")
    _write(target, done)
    partial.unlink(missing_ok=True)
    log.info("wrote the index %s", target)
    return sum(shard.damaged for shard in done.values())


def _partial(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.partial")


def _known(path: str, stats: Mapping[str, ranges.Stat]) -> Iterator[tuple[str, Shard]]:
    """Yields the shards of whole and partial indices whose files have not changed since.

    Where the bucket gives the checksum of a file, a new generation with the same content counts.
    """
    for index in (file for whole in places(path) for file in (whole, _partial(whole))):
        with contextlib.suppress(ValueError, OSError):
            for name, shard in _read(index).items():
                then, now = shard.stat, stats.get(name)
                same = now and then.size == now.size and shard.crc == now.crc
                if now and (same or then == now):
                    yield name, dataclasses.replace(shard, stat=now)


def _writable(path: str, done: Mapping[str, Shard]) -> epath.Path:
    """Returns the first of the `places` that can be written, tried with a partial index."""
    reasons = []
    for target in places(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(_partial(target), done)
        except Exception as error:  # gcsfs raises classes of its own
            reasons.append(f"{target}: {error}")
            continue
        if reasons:
            log.warning("the index cannot be beside the data (%s): it goes to %s", *reasons, target)
        return target
    raise ValueError(
        f"the index cannot be written: {'; '.join(reasons)}. Set {CACHE_VARIABLE} to a directory "
        "that can be written"
    )


def _write(path: epath.Path, shards: Mapping[str, Shard]) -> None:
    header = json.dumps(
        [
            (name, s.stat.generation, s.stat.size, s.crc, s.damaged, len(s.lengths))
            for name, s in sorted(shards.items())
        ]
    ).encode()
    numbers = [
        array.astype(UINT32).tobytes()
        for _, shard in sorted(shards.items())
        for array in (shard.lengths, shard.crcs)
    ]
    rest = b"".join([struct.pack("<Q", len(header)), header, *numbers])
    content = MAGIC + struct.pack("<I", google_crc32c.value(rest)) + rest
    if gcs.is_bucket(path):
        path.write_bytes(content)  # an object is there whole or not at all
        return
    # Hosts that share a disk may all write: their process ids are no different names.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_bytes(content)
    scratch.replace(path)


def _scan(directory: ranges.Directory, name: str, stat: ranges.Stat, count: int) -> Shard:
    """Reads one shard from begin to end. Raises ValueError for one that cannot be indexed."""
    path = f"{directory.path}/{name}"
    lengths, crcs, damaged = array("L"), array("L"), 0
    raw = ranges.RangeFile(directory, name, stat.size)
    for length, crc, intact in tfrecord.scan(io.BufferedReader(raw, tfrecord.PIECE), path):
        lengths.append(length)
        crcs.append(crc)
        damaged += not intact
    if max(lengths, default=0) >= 2**32:
        raise ValueError(f"{path} holds a record of {max(lengths)} bytes: the index has 32 bits")
    if len(lengths) != count:
        raise ValueError(f"{path} holds {len(lengths)} records, the data set says {count}")
    if stat.crc not in (None, raw.crc):
        raise ValueError(f"{path} was written while it was indexed")
    if damaged:
        log.warning("%s: %d of %d records are damaged", path, damaged, count)
    return Shard(stat, raw.crc, damaged, np.array(lengths, UINT32), np.array(crcs, UINT32))
