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
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from localglobal_jax.checkpoints import objects, workdir

MANIFEST = workdir.MANIFEST
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


def write_manifest(directory: epath.Path) -> None:
    """Writes ``files.json``: every file below the directory with its size and checksum."""
    sizes = {name: size for name, size in objects.sizes(directory).items() if name != MANIFEST}
    text = _manifest({name: [sizes[name], crc] for name, crc in _checksums(directory, sizes)})
    if workdir.is_remote(directory):
        objects.write(directory, {MANIFEST: text.encode()})
    else:
        (directory / MANIFEST).write_text(text)


def _checksums(directory: epath.Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Yields the crc32 of each file; None above `WHOLE` bytes, where the file is not read."""
    small = {name: size for name, size in sizes.items() if size <= WHOLE}
    yield from ((name, None) for name in sizes if name not in small)
    for name, contents in objects.contents(directory, small):
        yield name, zlib.crc32(contents)


def check_manifest(directory: epath.Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raises ValueError, naming the file, unless all listed files are unchanged.

    `share`: this host and the number of hosts. Each reads its part of the files, and the sizes of
    all: if every host read every file, a large pod would read terabytes to restore gigabytes.
    """
    sizes = objects.sizes(directory)
    if MANIFEST not in sizes:
        raise ValueError(f"{MANIFEST} is missing")
    try:
        text = dict(objects.contents(directory, {MANIFEST: sizes[MANIFEST]}))[MANIFEST]
        files = json.loads(text)["files"]
        intact = _manifest(files).encode() == text
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    if not intact:
        raise ValueError(f"{MANIFEST} is damaged")
    for name, (size, _) in files.items():
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if sizes[name] != size:
            raise ValueError(f"{name} has changed: {sizes[name]} bytes; written were {size}")
    host, hosts = share
    for name, found in _checksums(directory, {n: sizes[n] for n in sorted(files)[host::hosts]}):
        if found != files[name][1]:
            raise ValueError(f"{name} has changed: crc32 {found}; written was {files[name][1]}")
