# SPDX-License-Identifier: Apache-2.0
"""Small data sets as TFDS prepares them, with one bad record in the middle."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import registered
from tensorflow_datasets.proto import tf_example_pb2

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.tfds import records

SIZE, BAD = 9, 4  # records, and the number of the bad one
BATCH, STEPS = 4, 7  # three epochs and a part
RECORDS = "-train.array_record-00000-of-00001"


def build(root: pathlib.Path, name: str, features: Any, examples: Sequence[dict]) -> pathlib.Path:
    """A prepared set with the one split "train"; returns its folder."""
    with registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager: Any) -> dict:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                yield from enumerate(examples)

    Small.name = name
    tfds.disable_progress_bar()
    Small(data_dir=str(root)).download_and_prepare(
        file_format="array_record", download_dir=root / "downloads"
    )
    return root / name / "1.0.0"


def image_features(channels: int) -> dict:
    image = tfds.features.Image(shape=(None, None, channels), encoding_format=None)
    return {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}


def serialized(values: dict[str, Any]) -> bytes:
    """A record as TFDS writes it: bytes, whole numbers or fractions; of each one or a list."""
    example = tf_example_pb2.Example()
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
        getattr(example.features.feature[key], kinds[type(items[0])]).value.extend(items)
    return example.SerializeToString()


def write(folder: pathlib.Path, name: str, contents: Sequence[bytes]) -> None:
    """Replaces the records of a set."""
    writer = array_record_module.ArrayRecordWriter(str(folder / f"{name}{RECORDS}"), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def copied(clean: pathlib.Path, root: pathlib.Path, contents: list[bytes]) -> pathlib.Path:
    """A copy of the set `clean` below `root`, with other records; returns its folder."""
    name = clean.parent.name
    target = root / name / clean.name
    shutil.copytree(clean, target)
    write(target, name, contents)
    return target


def batches(root: pathlib.Path, name: str, **options: Any) -> list[loader.Batch]:
    """Three epochs of training and one evaluation."""
    chosen = schema.Images(name=name, dir=str(root), image_size=(12, 16), **options)
    train = pipeline.open_split(chosen, "train", train=True)
    found = list(loader.train_batches(train, batch_size=BATCH, seed=5, start=0, stop=STEPS))
    held = pipeline.open_split(chosen, "train", train=False)
    return [*found, *loader.eval_batches(held, batch_size=BATCH)]


def same_elsewhere(dirty: list[loader.Batch], clean: list[loader.Batch]) -> int:
    """Asserts that all slots but the bad record's are bit-identical; counts the masked slots."""
    masked = 0
    for d, c in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(d["index"], c["index"], strict=True)
        others = c["index"] != BAD
        for key in c:
            np.testing.assert_array_equal(d[key][others], c[key][others], strict=True)
        masked += int((d["mask"][~others] == 0).sum())
        assert not d["image"][~others][d["mask"][~others] == 0].any(), "a skipped slot is not black"
    return masked


def verdict(root: pathlib.Path, name: str, clean: list[loader.Batch], **options: Any) -> str:
    """Reads a set whose middle record may be bad: works or skipped; asserts the guarantees."""
    try:
        found = batches(root, name, **options)
    except records.BadRecord as error:
        where = f"record {BAD} of {name}/1.0.0 train (record {BAD} of {root}"
        assert where in str(error), f"does not name the record: {error}"
        found = batches(root, name, max_bad_records=1, **options)
        slots = sum(int((batch["index"] == BAD).sum()) for batch in clean)
        padding = sum(int((b["index"] == BAD)[b["mask"] == 0].sum()) for b in clean)
        masked = same_elsewhere(found, clean)
        assert masked == slots, f"{masked} of {slots} slots masked ({padding} of padding)"
        return "skipped"
    same_elsewhere(found, clean)
    return "works"
