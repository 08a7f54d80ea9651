# SPDX-License-Identifier: Apache-2.0
"""The recipe that the ImageNet configs share; each config sets what differs. Imports no jax."""

import json
import os
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

IMAGES = 1_281_167  # in the training split of imagenet2012
# Images of training splits. CoAtNet's paper gives 13 million for ImageNet-21k, whose editions have
# 12.7 to 14.2 million; the files of a prepared set have its own number.
SIZES = {
    "imagenet2012": IMAGES,
    "imagenet21k": 13_000_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "fashion_mnist": 60_000,
    "places365_small": 1_803_460,
    "placesfull": 10_653_087,
}
# Sets of `SIZES` without a split "validation"
EVALUATED = dict.fromkeys(("cifar10", "cifar100", "fashion_mnist"), "test")


def steps(epochs: int, batch_size: int, images: int = IMAGES) -> int:
    """Returns the optimizer steps of `epochs` passes over `images` images, rounded down."""
    return epochs * images // batch_size


def images_of(dataset: str, size: str = "full") -> int:
    """Returns the images in the training split of a TFDS data set: of its files, else of `SIZES`.

    Of ``size="tiny"``, whose number of steps is fixed, those of ImageNet.

    The files are those in $TFDS_DATA_DIR or ~/tensorflow_datasets, of the newest version. Raises
    ValueError for a set that is in neither.
    """
    if size == "tiny":
        return IMAGES
    name, _, version = dataset.partition(":")
    root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" not in root:
        folder = pathlib.Path(root).expanduser() / name
        files = folder.glob(f"{version or '*'}/dataset_info.json")
        whole = (file for file in files if re.fullmatch(r"\d+(\.\d+)*", file.parent.name))
        for file in sorted(whole, key=_version, reverse=True):
            try:
                splits = json.loads(file.read_text(encoding="utf-8")).get("splits", [])
                lengths = {s.get("name"): s.get("shardLengths", []) for s in splits}
                found = sum(map(int, lengths.get("train", [])))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete {file.parent} and prepare the set again"
                ) from None
            if found:
                return found
    if name in SIZES:
        return SIZES[name]
    raise ValueError(
        f"dataset={dataset}: its number of images is not known: it is not prepared in {root}. "
        "Give images=N, those of its training split (or steps=N to fine-tune); known are "
        f"{', '.join(SIZES)}"
    )


def _version(file: pathlib.Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", file.parent.name)]


def timm_randaugment(config: ConfigDict, probability: float = 0.5) -> None:
    """Sets timm's ``rand-m9-mstd0.5-inc1``, as the code of VOLO and of Focal Transformer has it."""
    config.data.update(
        randaugment_magnitude=9,
        randaugment_scale="timm",
        randaugment_probability=probability,
        randaugment_noise=0.5,
    )


def imagenet(
    arg: ConfigDict, *, steps: int, batch_size: int, dataset: str = "imagenet2012"
) -> ConfigDict:
    """Returns a config without ``model``, ``task`` and ``optim``.

    `arg`: the parsed argument of the config, with ``resolution`` and ``data``.
    """
    config, split = ConfigDict(), EVALUATED.get(dataset.partition(":")[0], "validation")
    config.steps = steps
    config.batch_size = batch_size  # images
    config.dtype = "bfloat16"  # activations; parameters stay float32
    config.data = dict(
        name=dataset,
        mock=arg.data == "mock",
        eval_splits=(split,),
        image_size=(arg.resolution, arg.resolution),  # pixels
        mean=(0.485, 0.456, 0.406),  # RGB, of ImageNet's pixels in [0, 1]
        std=(0.229, 0.224, 0.225),
        crop="resized",
        flip=True,
        randaugment_layers=2,  # RandAugment(2, 15); 15 is the default
        threads=16,  # decoding threads of one host
    )
    config.eval = dict(every=5_000)  # steps
    config.checkpoint = dict(every=1_000, best=f"{split}/accuracy")  # steps
    config.log = dict(every=100)  # steps
    return config


def shrink(config: ConfigDict, **model: Any) -> None:
    """Turns `config` into the ``size=tiny`` run: ten steps of eight images, and a small `model`."""
    config.update(steps=10, batch_size=8, dtype="float32")
    config.data.image_size = (64, 64)
    config.model.update(model)
    config.eval.every = config.checkpoint.every = config.log.every = 5


def shrink_text(config: ConfigDict, *, batch_size: int, **data: Any) -> None:
    """Turns `config` into the ``size=tiny`` run: 20 steps of `batch_size` tokens, a small model."""
    config.update(steps=20, batch_size=batch_size)
    config.model.update(depths=(1, 1), widths=(32, 32), heads=(2, 2), hidden=(32, 32))
    config.data.update(max_length=48, buckets=2, **data)
    config.optim.warmup_steps = 5
    config.eval.every = config.checkpoint.every = 10
