# SPDX-License-Identifier: Apache-2.0
"""Rate and CPU time of input by threads and worker processes; writes workers.csv.

    python experiments/benchmarks/input_workers.py

Photographs of 500 x 375 (see input.py), random crops of 224 x 224, flips. The settings are measured
in turns. CPU time counts from the first batch on, of this process and of the workers, in which one
of their queues was filled.
"""

import os
import pathlib
import resource
import tempfile
import time

import input as files
import input_ours
import numpy as np
import pairs

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline

HERE = pathlib.Path(__file__).parent
BATCH, STEPS, WARM_UP, ROUNDS = 64, 24, 8, 3
SETTINGS = ((0, 1), (0, 2), (1, 1), (2, 1))  # workers, threads


def children_seconds():
    """Returns the CPU seconds of this process's children that live."""
    found = 0.0
    for task in pathlib.Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            fields = pathlib.Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
            found += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return found


def own_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def once(paths, workers, threads):
    """Returns wall, this process's and the workers' CPU time, milliseconds an image."""
    options = schema.Images(
        image_size=(224, 224),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop="resized",
        flip=True,
        in_memory=False,
        threads=threads,
    )
    source = pipeline.ImageSource(input_ours.Files(paths, 4096), options, train=True)
    batches = loader.train_batches(
        source,
        batch_size=BATCH,
        seed=0,
        start=0,
        stop=WARM_UP + STEPS + 8,  # the queues are as full at the end as they were after warm-up
        threads=1,
        workers=workers,
    )
    for _ in range(WARM_UP):
        next(batches)
    began = np.array([time.perf_counter(), own_seconds(), children_seconds()])
    for _ in range(STEPS):
        next(batches)
    ended = np.array([time.perf_counter(), own_seconds(), children_seconds()])
    batches.close()
    return 1e3 * (ended - began) / (BATCH * STEPS)


def main():
    with tempfile.TemporaryDirectory() as folder:
        paths = files.photographs(files.TYPICAL, folder)
        found = np.array([[once(paths, *one) for one in SETTINGS] for _ in range(ROUNDS)])
    for i, (workers, threads) in enumerate(SETTINGS):
        wall, own, children = np.median(found[:, i], axis=0)
        low, high = np.percentile(1e3 / found[:, i, 0], [0, 100])
        row = {
            "name": f"{workers} workers, {threads} threads",
            "workers": workers,
            "threads": threads,
            "images_per_second": round(1e3 / wall),
            "lowest": round(low),
            "highest": round(high),
            "cpu_ms": round(own + children, 3),
            "main_ms": round(own, 3),
            "load": round(os.getloadavg()[0], 1),
            **pairs.environment(),
        }
        pairs.write(HERE / "workers.csv", [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
