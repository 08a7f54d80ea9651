# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): our input pipeline. ``python input_ours.py LAYERS IMAGES JPEG...``

Prints CPU seconds of the whole process, not wall time: input runs beside training.
"""

import pathlib
import sys
import time

import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline, readers


class Files:
    """A `readers.Reader` of JPEG files, over and over."""

    classes, channels, shape = 1, 3, None

    def __init__(self, paths, count):
        self._data = [pathlib.Path(path).read_bytes() for path in paths]
        self._count = count

    def __len__(self):
        return self._count

    def block(self, index):
        return [self._data[i % len(self._data)] for i in index]

    def decode(self, record, part=None):
        return readers.decode(record, 3, part), 0


def main(layers, count, *paths):
    options = schema.Images(
        image_size=(224, 224),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop="resized",
        flip=True,
        randaugment_layers=int(layers),
        in_memory=False,
        threads=2,
    )
    source = pipeline.ImageSource(Files(paths, int(count)), options, train=True)

    def go():
        for start in range(0, int(count), 64):
            index = np.arange(start, start + 64)
            source.batch(index, loader.PositionRng(0, start))

    go()
    print("ready ours", flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        go()
        print("seconds", time.process_time() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
