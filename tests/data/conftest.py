# SPDX-License-Identifier: Apache-2.0
"""Small data sets on disk, written with TFDS itself, and ways to damage them."""

import json
import pathlib
import struct

import pytest


def write_tfds(root, name, examples, *, channels=1, classes=10, shape=(None, None)):
    """A prepared array_record set with the one split "train" of ``[(image bytes, label), ...]``."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                image = tfds.features.Image(shape=(*shape, channels), encoding_format=None)
                label = tfds.features.ClassLabel(num_classes=classes)
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, (image, label) in enumerate(examples):
                    yield i, {"image": image, "label": label}

    Small.name = name
    tfds.disable_progress_bar()
    Small(data_dir=str(root)).download_and_prepare(
        file_format="array_record", download_dir=root / "downloads"
    )
    return pathlib.Path(root, name, "1.0.0")


def write_translations(root, name, examples, *, languages=("de", "en"), config="de-en"):
    """A prepared set, as TFDS's own builder would leave it; examples: ``{language: text}``."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012

            def _info(self):
                features = tfds.features.Translation(languages=languages)
                return tfds.core.DatasetInfo(
                    builder=self, features=features, supervised_keys=languages[:2]
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(), "validation": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(examples)

    Small.name = name
    tfds.disable_progress_bar()
    Small(data_dir=str(root)).download_and_prepare(
        file_format="array_record", download_dir=root / "downloads"
    )


def frame(record):
    """One record in TFRecord framing, written down from the format, not from our reader."""
    import google_crc32c

    def mask(data):
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + mask(length) + record + mask(record)


def as_tfrecord(prepared, target):
    """The TFRecord twin of an array_record directory, as TensorFlow would have written it."""
    from array_record.python import array_record_module

    target.mkdir(parents=True)
    for path in prepared.iterdir():
        if ".array_record" in path.name:
            reader = array_record_module.ArrayRecordReader(str(path))
            framed = b"".join(frame(record) for record in reader.read_all())
            reader.close()
            (target / path.name.replace("array_record", "tfrecord")).write_bytes(framed)
        else:
            text = path.read_text().replace('"array_record"', '"tfrecord"')
            (target / path.name).write_text(text)
    assert json.loads((target / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    return target


def as_tfrecord_shards(prepared, target, count):
    """The TFRecord twin of `prepared` with ``count`` shards of its split "train"."""
    as_tfrecord(prepared, target)
    (whole,) = target.glob("*-train.tfrecord-*")
    data, frames = whole.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little") + 16
        frames.append(data[:size])
        data = data[size:]
    whole.unlink()
    lengths = [len(frames[i::count]) for i in range(count)]
    for i, length in enumerate(lengths):
        name = whole.name.replace("00000-of-00001", f"{i:05d}-of-{count:05d}")
        start = sum(lengths[:i])
        (target / name).write_bytes(b"".join(frames[start : start + length]))
    info = json.loads((target / "dataset_info.json").read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] = [str(length) for length in lengths]
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target


@pytest.fixture(scope="session")
def make_tfrecord_shards():
    return as_tfrecord_shards


@pytest.fixture(scope="session")
def make_tfds():
    return write_tfds


@pytest.fixture(scope="session")
def make_translations():
    return write_translations


@pytest.fixture
def make_tfrecord():
    return as_tfrecord


FOLDER_CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        steps=4, batch_size=8, eval=dict(every=0),
        model=dict(name="coatnet", layout="C", depths=(1,), widths=(8,), stem=(4, 4)),
        data=dict(name="folder", image_size=(16, 16), eval_splits=("validation",)),
    ))
"""


@pytest.fixture(scope="session")
def folder_config(tmp_path_factory):
    """The file of a config that trains a very small model on a folder of pictures."""
    file = tmp_path_factory.mktemp("configs") / "pictures.py"
    file.write_text(FOLDER_CONFIG)
    return str(file)
