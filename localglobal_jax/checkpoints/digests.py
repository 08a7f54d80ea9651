# SPDX-License-Identifier: Apache-2.0
"""Digests of arrays and a manifest of files, to detect a checkpoint with a wrong bit.

An array's digest is two sums, modulo 2**32, of a hash of every word's bits and position. Addition
modulo 2**32 is commutative: the digest does not depend on the sharding, and NumPy gives the same
one. The hash is a bijection of the word at a given position, so one changed word
always changes the digest. Several changed words go unnoticed with a probability of about 2**-64.
"""

import json
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

MANIFEST = "files.json"
WHOLE = 64 * 2**20  # bytes; larger files are checked by size here, by the digests of their arrays
WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # 8 bytes are two words, low first
SEEDS = (0x9E3779B9, 0x7F4A7C15)


def _mix(x: Any) -> Any:
    """MurmurHash3's 32-bit finalizer, a bijection; takes uint32 arrays of JAX or NumPy."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def check_dtype(dtype: Any, name: str = "this array") -> None:
    """Raises ValueError unless `dtype` is real, integer or boolean, of 1, 2, 4 or 8 bytes."""
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jnp.issubdtype(dtype, np.complexfloating):
        raise ValueError(
            f"no digest for {name} of dtype {dtype}: for a PRNG key store "
            "jax.random.key_data(key), for complex numbers the real and the imaginary part"
        )


@jax.jit
def on_device(x: jax.Array) -> jax.Array:
    """Returns the digest, uint32 [2], on the device. Compiled once per shape; `text` formats it."""
    check_dtype(x.dtype)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):  # the row-major index, written so that it shards with the array
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    lanes = tuple(_mix(words ^ _mix(position + np.uint32(seed))) for seed in SEEDS)
    zeros, axes = (np.uint32(0),) * len(lanes), tuple(range(words.ndim))
    # One reduction of both: XLA then keeps nothing (two sums took twice the array in temporaries).
    sums = jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)
    return jnp.stack(sums)


def on_host(x: np.ndarray, block: int = 2**20) -> np.ndarray:
    """Returns the same digest as `on_device`, by NumPy, one block at a time."""
    words = np.ascontiguousarray(x).reshape(-1).view(WORDS[x.dtype.itemsize])
    lanes = np.zeros(2, np.uint32)
    for start in range(0, words.size, block):
        part = words[start : start + block].astype(np.uint32)
        position = (np.arange(start, start + part.size) % 2**32).astype(np.uint32)
        for lane, seed in enumerate(SEEDS):
            mixed = _mix(part ^ _mix(position + np.uint32(seed)))
            lanes[lane] = (int(lanes[lane]) + int(mixed.sum(dtype=np.uint64))) % 2**32
    return lanes


def text(lanes: Any) -> str:
    """Formats a digest as 16 hexadecimal digits."""
    return "".join(f"{int(lane):08x}" for lane in lanes)


def _manifest(files: dict[str, list[int | None]]) -> str:
    listed = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(listed.encode())},"files":{listed}}}\n'


def _entry(path: epath.Path) -> list[int | None]:
    """Returns [bytes, crc32]; the CRC is None above `WHOLE` bytes, where the file is not read."""
    size = path.stat().length
    return [size, zlib.crc32(path.read_bytes()) if size <= WHOLE else None]


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():  # epath has no rglob
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def write_manifest(directory: epath.Path) -> None:
    """Writes ``files.json``: every file below the directory with its size and checksum."""
    files = {
        path.relative_to(directory).as_posix(): _entry(path)
        for path in _files(directory)
        if path != directory / MANIFEST
    }
    (directory / MANIFEST).write_text(_manifest(files))


def check_manifest(directory: epath.Path) -> None:
    """Raises ValueError, naming the file, unless all listed files are unchanged."""
    path = directory / MANIFEST
    if not path.exists():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        files = json.loads(path.read_bytes())["files"]
        intact = _manifest(files).encode() == path.read_bytes()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    if not intact:
        raise ValueError(f"{MANIFEST} is damaged")
    for name, (size, crc) in files.items():
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing")
        found = _entry(directory / name)
        if found != [size, crc]:
            raise ValueError(
                f"{name} has changed: {found[0]} bytes, crc32 {found[1]}; "
                f"written were {size} bytes, crc32 {crc}"
            )
