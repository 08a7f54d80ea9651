# SPDX-License-Identifier: Apache-2.0
"""Identity of a run's training records: their number, names, contents and order, in one line.

The line is in every checkpoint. Batch n is a function of the seed and n over these records, so a
run resumes only over the same ones. A line consists of parts, ``"80 images, names 1f00d5aa"``. A
part that one of two lines lacks is not compared: older checkpoints have the number only, and a
bucket's checksums are not those of a disk.
"""

import contextlib
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from localglobal_jax.checkpoints import workdir
from localglobal_jax.data.tfds import records

FILE = "training_records.json.gz"
SAMPLED = 64  # records of a data set without names that are compared
SHOWN = 3  # names in a message


class Record(NamedTuple):
    """A training record: its name, its size in bytes, and a mark of its contents."""

    name: str
    size: int
    mark: str


def line(count: str, parts: Mapping[str, str]) -> str:
    """Returns the line of `count`, such as "80 images", and digests by kind."""
    return ", ".join([count, *(f"{kind} {digest}" for kind, digest in parts.items())])


def same(was: str, now: str) -> bool:
    """Returns whether two lines describe the same records, in the parts that both have."""
    (count, then), (number, found) = _parts(was), _parts(now)
    return count == number and all(found.get(k, digest) == digest for k, digest in then.items())


def _parts(text: str) -> tuple[str, dict[str, str]]:
    count, *rest = text.split(", ")
    return count, {kind: digest for kind, _, digest in (part.partition(" ") for part in rest)}


def digest(items: Iterable[str]) -> str:
    """Returns a checksum of strings and their order, 8 hexadecimal digits."""
    value = 0
    for item in items:
        value = zlib.crc32(item.encode("utf-8", "surrogateescape") + b"\0", value)
    return f"{value:08x}"


def of_named(found: Sequence[Record], marked: str) -> dict[str, str]:
    """Returns the digests of named records. ``marked``: the kind of their marks, "" for none."""
    parts = {"names": digest(record.name for record in found)}
    parts["sizes"] = digest(str(record.size) for record in found)
    if marked:
        parts[marked] = digest(record.mark for record in found)
    return parts


def of_sample(size: int, block: Callable[[Sequence[int]], Sequence[Any]]) -> dict[str, str]:
    """Returns the digest of some of ``size`` records without names, evenly spread.

    ``block``: see `readers.Reader`. Empty for generated records, which have no bytes, and where
    one cannot be read: the run skips it, or names it.
    """
    numbers = np.unique(np.linspace(0, size - 1, min(size, SAMPLED)).astype(int)).tolist()
    parts = []
    for record in block(numbers) if numbers else ():
        if isinstance(record, records.BadRecord):
            return {}
        for key, value in sorted(record.items()):
            if isinstance(value, np.ndarray):
                return {}
            parts.append(f"{key} {zlib.crc32(value)}" if isinstance(value, bytes) else f"{value!r}")
    return {"sample": digest(parts)} if parts else {}


def write(directory: pathlib.Path, order: str, found: Sequence[Record]) -> None:
    """Writes the names of a run's training records to its workdir, if they are not there."""
    if _read(directory).get("order") == order:
        return
    content = {"order": order, "records": [list(record) for record in found]}
    data = gzip.compress(json.dumps(content).encode(), mtime=0)
    workdir.write_atomically(directory / FILE, data)


def changes(directory: pathlib.Path, was: str, found: Sequence[Record]) -> str:
    """Returns how `found` differs from the records in the workdir; "" if these are not known.

    ``was``: the line of the checkpoint; the file in the workdir may be of another one.
    """
    written = _read(directory)
    if written.get("order") != was:
        return ""
    then = {name: Record(name, size, mark) for name, size, mark in written["records"]}
    now = {record.name: record for record in found}
    both = then.keys() & now.keys()
    kinds = {
        "new": [name for name in now if name not in then],
        "gone": [name for name in then if name not in now],
        "replaced": sorted(name for name in both if _replaced(then[name], now[name])),
    }
    said = [
        f"{len(names)} {kind}, such as {', '.join(map(repr, names[:SHOWN]))}"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(said) or "the same files in another order"


def _replaced(then: Record, now: Record) -> bool:
    marked = then.mark.partition(" ")[0] == now.mark.partition(" ")[0]  # of one kind
    return then.size != now.size or (marked and then.mark != now.mark)


def _read(directory: pathlib.Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, EOFError, zlib.error):
        found = json.loads(gzip.decompress((directory / FILE).read_bytes()))
        if isinstance(found, dict) and isinstance(found.get("records"), list):
            return found
    return {}
