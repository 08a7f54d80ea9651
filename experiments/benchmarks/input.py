# SPDX-License-Identifier: Apache-2.0
"""CPU time of input per image, beside tf.data's; writes input.csv.

    python experiments/benchmarks/input.py --theirs PYTHON

`PYTHON`: one with tensorflow. The images are the two photographs (640 x 427) that scikit-learn
ships, as JPEG: as they are (196 and 143 kB, colour in full), and as ImageNet's are on average (500
x 375, 88 and 50 kB, colour halved). Small sets are Fashion-MNIST's shape, in memory.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import pairs
import sklearn.datasets

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline

HERE = pathlib.Path(__file__).parent
IMAGES, ROUNDS = 512, 7
LARGE, TYPICAL = "640 x 427", "500 x 375"
WORK = {  # files, layers of RandAugment
    "crop and flip": (LARGE, 0),
    "crop, flip and RandAugment of 2": (LARGE, 2),
    "crop and flip, 500 x 375": (TYPICAL, 0),
}
GOAL, SMALL_GOAL = 1.2, 0.05  # times tf.data's CPU time; ms


def photographs(size, folder):
    """Returns the paths of the two photographs; of another size than theirs made in ``folder``."""
    paths = sorted((pathlib.Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    if size == LARGE:
        return [str(path) for path in paths]
    import cv2  # noqa: PLC0415, after localglobal_jax, which bounds the pixels of an image

    made = []
    for path in paths:
        image = cv2.resize(cv2.imread(str(path)), (500, 375), interpolation=cv2.INTER_AREA)
        made.append(str(pathlib.Path(folder, path.name)))
        cv2.imwrite(made[-1], image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return made


def beside(name, size, layers, python, folder):
    """Measures one row: images of 224 x 224."""
    arguments = [str(layers), str(IMAGES), *photographs(size, folder)]
    sides = [
        pairs.Worker([sys.executable, str(HERE / "input_ours.py"), *arguments]),
        pairs.Worker([python, str(HERE / "input_theirs.py"), *arguments]),
    ]
    seconds = pairs.in_turns(sides, ROUNDS)
    for side in sides:
        side.close()
    ms = 1e3 * seconds / IMAGES
    return {
        "name": name,
        "goal": GOAL,
        **{f"ratio_{k}": v for k, v in pairs.spread(ms[:, 0] / ms[:, 1]).items()},
        "our_ms": pairs.spread(ms[:, 0])["median"],
        "their_ms": pairs.spread(ms[:, 1])["median"],
        "theirs": sides[1].about,
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


class Small(list):
    """A `readers.Reader` of arrays."""

    classes, channels, shape = 10, 1, (28, 28)

    def block(self, index):
        return [self[i] for i in index]

    def decode(self, record, part=None):
        return record, 0


def small():
    """Measures one row: random pad-crops and flips of 60,000 small images in memory."""
    options = schema.Images(
        image_size=(28, 28), in_memory=True, crop="pad", pad=2, flip=True, threads=2
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    source = pipeline.ImageSource(Small(pixels), options, train=True)
    found = []
    for part in range(ROUNDS + 1):
        began = time.process_time()
        for start in range(0, 60_000, 128):
            index = np.arange(start, min(start + 128, 60_000))
            source.batch(index, loader.PositionRng(part, start))
        found.append(1e3 * (time.process_time() - began) / 60_000)
    return {
        "name": "28 x 28 in memory, pad-crop and flip",
        "goal": SMALL_GOAL,
        "our_ms": pairs.spread(np.array(found[1:]))["median"],
        "load": round(os.getloadavg()[0], 1),
        **pairs.environment(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="has tensorflow")
    args = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # what `localglobal` sets for itself
    with tempfile.TemporaryDirectory() as folder:
        report(small())
        for name, (size, layers) in WORK.items():
            report(beside(name, size, layers, args.theirs, folder))


def report(row):
    """Writes a row and prints its figures."""
    pairs.write(HERE / "input.csv", [row])
    print({k: row[k] for k in row if k.endswith(("name", "ms", "median", "goal"))}, flush=True)


if __name__ == "__main__":
    main()
