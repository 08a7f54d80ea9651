# SPDX-License-Identifier: Apache-2.0
"""Random reads: TFRecord through its index beside ArrayRecord; writes random_reads.csv.

    python experiments/benchmarks/random_reads.py

Batches of 256 records of 110 kB (photographs of ImageNet) and of 300 bytes (a pair of sentences),
from 16 shards: on disk (in the page cache), in a bucket of the tests' server, and through a proxy
that holds back every request for 30 ms, as long as a bucket takes to answer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import pairs
from array_record.python import array_record_module
from etils import epath

from localglobal_jax.data.tfds import gcs, tfrecord, tfrecord_index
from localglobal_jax.data.tfds.array_records import ArrayRecordFiles
from localglobal_jax.data.tfds.tfrecord_files import TFRecordFiles

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tests"))
SHARDS, BATCH, ROUNDS = 16, 256, 20
SIZES = {"110 kB": (110_000, 2048), "300 B": (300, 20_480)}  # bytes, records
DELAY = 0.03  # seconds
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the command line sets it
PLACES = {"disk": 0.0, "bucket, same machine": 0.0, "bucket, 30 ms away": DELAY}


def names(kind):
    return [f"set-train.{kind}-{i:05d}-of-{SHARDS:05d}" for i in range(SHARDS)]


def make(folder, size, count):
    """Writes the same records in both formats."""
    rng = np.random.default_rng(0)
    for ours, theirs in zip(names("tfrecord"), names("array_record"), strict=True):
        writer = array_record_module.ArrayRecordWriter(f"{folder}/{theirs}", "group_size:1")
        with open(f"{folder}/{ours}", "wb") as file:
            for _ in range(count // SHARDS):
                record = rng.bytes(size)
                writer.write(record)
                length = len(record).to_bytes(8, "little")
                for part in (length, record):
                    file.write(part + tfrecord.masked_crc(part).to_bytes(4, "little"))
        writer.close()


def instructions(folder, kind, count):
    return [
        types.SimpleNamespace(filename=f"{folder}/{name}", examples_in_shard=count // SHARDS)
        for name in names(kind)
    ]


def measure(folder, count):
    """Returns the seconds of batches, [rounds, 2, 2]: TFRecord, ArrayRecord; wall, CPU."""
    tfrecord_index.make(folder, {name: count // SHARDS for name in names("tfrecord")})
    place = gcs.place(folder)
    sides = [
        TFRecordFiles(instructions(folder, "tfrecord", count), place),
        ArrayRecordFiles(instructions(folder, "array_record", count), place),
    ]
    rng, seconds = np.random.default_rng(1), np.zeros((ROUNDS + 1, 2, 2))
    for turn, row in enumerate(seconds):
        files = rng.integers(SHARDS, size=BATCH).tolist()
        places = list(zip(files, rng.integers(count // SHARDS, size=BATCH).tolist(), strict=True))
        found = {}
        for side in (0, 1) if turn % 2 else (1, 0):
            began = clocks()
            found[side] = sides[side].read(places)
            row[side] = clocks() - began
        if found[0] != found[1]:
            raise RuntimeError("the two formats gave different records")
    return seconds[1:]


def clocks():
    return np.array([time.perf_counter(), time.process_time()])


async def proxy(port, target):
    """Forwards connections; every piece that a client sends waits for `DELAY`."""

    async def copy(source, sink, delay):
        with contextlib.suppress(ConnectionError):
            while data := await source.read(2**18):
                await asyncio.sleep(delay)
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader, writer):
        there = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(copy(reader, there[1], DELAY), copy(there[0], writer, 0))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def row(place, size, folder, environment):
    """Measures in a process of its own, since the clients read the environment once."""
    count = SIZES[size][1]
    command = [sys.executable, __file__, "--measure", folder, str(count)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment, **MEMORY},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    seconds = np.array(json.loads(done.stdout.splitlines()[-1]))
    wall, cpu = np.moveaxis(np.median(seconds, 0), -1, 0)
    ratios = seconds[:, 1, 0] / seconds[:, 0, 0]
    return {
        "name": f"{size}, {place}",
        "tfrecord_per_s": round(BATCH / wall[0]),
        "array_record_per_s": round(BATCH / wall[1]),
        **{f"ratio_{key}": value for key, value in pairs.spread(ratios).items()},
        "tfrecord_cpu_us": round(1e6 * cpu[0] / BATCH, 1),
        "array_record_cpu_us": round(1e6 * cpu[1] / BATCH, 1),
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


def main():
    import gcs_server  # noqa: PLC0415, from the tests

    with tempfile.TemporaryDirectory() as scratch, gcs_server.serve() as url:
        port = free_port()
        command = [sys.executable, __file__, "--proxy", str(port), url.rpartition(":")[2]]
        delayed = subprocess.Popen(command)
        rows = []
        try:
            for size, (length, count) in SIZES.items():
                folder = pathlib.Path(scratch, size.replace(" ", ""))
                folder.mkdir()
                make(folder, length, count)
                bucket = f"gs://{gcs_server.new_bucket(url)}/set"
                for path in folder.iterdir():
                    (epath.Path(bucket) / path.name).write_bytes(path.read_bytes())
                for place, delay in PLACES.items():
                    address = f"http://127.0.0.1:{port}" if delay else url
                    where = str(folder) if place == "disk" else bucket
                    rows.append(row(place, size, where, gcs_server.environment(address)))
                    print(rows[-1])
        finally:
            delayed.kill()
            delayed.wait()
    pairs.write(HERE / "random_reads.csv", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--proxy", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.proxy:
        asyncio.run(proxy(*given.proxy))
    elif given.measure:
        print(json.dumps(measure(given.measure[0], int(given.measure[1])).tolist()))
    else:
        main()
