# SPDX-License-Identifier: Apache-2.0
"""A set left as TFRecord trains as its array_record twin does, on disk and in a bucket."""

import json
import pathlib

import jax
import numpy as np
import pytest
import small
from etils import epath

from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline as images
from localglobal_jax.data.text import bucketing
from localglobal_jax.data.text import pipeline as texts
from localglobal_jax.data.tfds import prepare, records, tfrecord_index

COUNTS = {"train": 1437, "test": 360}
SHARD = "digits-train.tfrecord-00000-of-00001"


def put(folder, target):
    epath.Path(target).mkdir(parents=True, exist_ok=True)
    for path in pathlib.Path(folder).iterdir():
        (epath.Path(target) / path.name).write_bytes(path.read_bytes())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tfrecord_index.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A data directory, empty."""
    return f"{tmp_path}/old" if request.param == "disk" else request.getfixturevalue("bucket")


@pytest.fixture
def digits(data_dir, tmp_path, root, make_tfrecord):
    """The version directory of the digits as TFRecord, without an index."""
    made = make_tfrecord(pathlib.Path(data_dir, "digits/1.0.0"), tmp_path / "made")
    put(made, f"{root}/digits/1.0.0")
    return f"{root}/digits/1.0.0"


def same(found, wanted):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in other:
            np.testing.assert_array_equal(one[key], other[key], strict=True)


def test_batches_of_images_are_those_of_the_twin(digits, root, data_dir):
    assert tfrecord_index.prepare(digits) == COUNTS
    assert prepare.verify(records.find_builder("digits", root)) == COUNTS
    options = {"crop": "resized", "image_size": (8, 8), "flip": True}
    for in_memory in (False, True):
        chosen = [
            schema.Images(dir=place, in_memory=in_memory, **options) for place in (root, data_dir)
        ]
        for shard in ((0, 1), (0, 2), (1, 2)):
            trained = (
                loader.train_batches(
                    images.open_split(one, "train", train=True),
                    **{"batch_size": 64, "seed": 1, "start": 0, "stop": 4, "shard": shard},
                )
                for one in chosen
            )
            same(*trained)
            evaluated = (
                loader.eval_batches(
                    images.open_split(one, "test[10%:90%]", train=False),
                    batch_size=64,
                    shard=shard,
                )
                for one in chosen
            )
            same(*evaluated)


def test_batches_made_by_workers_are_those_of_this_process(digits, root, sentences):
    """Each worker opens the index and the files for itself."""
    tfrecord_index.prepare(digits)
    options = {"crop": "resized", "image_size": (8, 8), "in_memory": False}
    source = images.open_split(schema.Images(dir=root, **options), "train", train=True)
    given = {"batch_size": 64, "seed": 1, "start": 2, "stop": 7}
    wanted = list(loader.train_batches(source, **given))
    same(loader.train_batches(source, **given, workers=2), wanted)
    text = texts.open_train(schema.Text(dir=root, **sentences))
    given = {"tokens": 256, "multiple": 4, "seed": 1, "start": 0, "stop": 5}
    wanted = list(texts.train_batches(text, **given))
    same(texts.train_batches(text, **given, workers=2), wanted)


@pytest.fixture
def sentences(root, tmp_path, make_translations, make_tfrecord):
    """A set of sentences as indexed TFRecord in `root`, and its twin in ``tmp_path / "new"``."""
    examples = [{"de": f"Satz {i} ist gut " * (i % 4), "en": f"it is {i}"} for i in range(90)]
    make_translations(tmp_path / "new", "wmt14_translate", examples)
    inside = "wmt14_translate/de-en/1.0.0"
    put(make_tfrecord(tmp_path / "new" / inside, tmp_path / "made_text"), f"{root}/{inside}")
    tfrecord_index.prepare(f"{root}/{inside}")
    return {"name": "wmt14_translate/de-en", "vocab": 300}


def test_batches_of_texts_are_those_of_the_twin(root, tmp_path, sentences):
    opened = [
        texts.open_train(schema.Text(dir=str(place), **sentences))
        for place in (root, tmp_path / "new")
    ]
    assert opened[0].text == opened[1].text
    for shard in ((0, 1), (0, 2), (1, 2)):
        training = {"tokens": 256, "multiple": 4, "seed": 1, "start": 0, "stop": 9, "shard": shard}
        same(*(texts.train_batches(one, **training) for one in opened))
        budget = bucketing.Budget(256, 4)
        same(*(texts.eval_batches(one, budget=budget, shard=shard) for one in opened))


def trained(workdir, root):
    """Returns the metrics of a run, clocks left out, and the state of its last checkpoint."""
    command = ["train", "--config=configs/coatnet_digits.py:size=tiny", f"--workdir={workdir}"]
    changes = ["steps=6", "log.every=1", f"data.dir={root}", "data.in_memory=False"]
    changes += [f"{field}={value}" for field, value in small.IMAGES.items()]
    assert main([*command, *(f"--config.{change}" for change in changes)]) == 0
    return metrics_of(workdir), reader.read(workdir)[1]


def metrics_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    named = ("step", "split", "loss", "accuracy", "grad_norm")
    return [{key: line[key] for key in named if key in line} for line in lines]


@pytest.mark.slow  # a run is a function of its batches, which the tests above compare
@pytest.mark.parametrize("root", ["bucket"], indirect=True)
def test_a_run_is_bit_for_bit_that_on_the_twin(digits, root, data_dir, tmp_path):
    tfrecord_index.prepare(digits)
    metrics, state = trained(tmp_path / "old_run", root)
    wanted, twin = trained(tmp_path / "new_run", data_dir)
    assert metrics == wanted
    assert [line["step"] for line in metrics if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert jax.tree.structure(state) == jax.tree.structure(twin)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(twin), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


# ------------------------------------------------------------------------------------ bad input


def test_without_an_index_both_ways_are_named(digits, root, tmp_path, capsys):
    command = ["train", "--config=configs/coatnet_digits.py:size=tiny", f"--workdir={tmp_path}/w"]
    assert main([*command, f"--config.data.dir={root}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`localglobal prepare --index {digits}`" in line
    assert f"`localglobal prepare --from_tfrecord {digits} --dir" in line
    assert not (tmp_path / "w").exists()


def test_the_command_makes_the_index(digits, capsys):
    assert main(["prepare", "--index", f"{digits}/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == COUNTS
    assert (epath.Path(digits) / tfrecord_index.NAME).exists()
    assert main(["prepare", "--index", f"{digits}x"]) == 2
    assert f"{digits}x" in capsys.readouterr().err


@pytest.mark.parametrize(
    "directory", ["gs:/x", "gs://bucket", "gs://no-such-bucket-here/x", "s3://x/y", "/etc/passwd"]
)
def test_a_directory_that_is_none_ends_in_one_line(gcs, directory, capsys):
    assert main(["prepare", "--index", directory]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert directory in line


def test_only_tfrecord_is_indexed(data_dir, capsys):
    assert main(["prepare", "--index", f"{data_dir}/digits/1.0.0"]) == 2
    assert f"{data_dir}/digits/1.0.0" in capsys.readouterr().err


def test_bad_records_are_counted_and_masked(digits, root, data_dir, capsys):
    """One has another checksum, one has the right one and is no example."""
    shard = epath.Path(digits) / SHARD
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[12 + length // 2] ^= 1
    second = 12 + length + 4
    length = int.from_bytes(content[second : second + 8], "little")
    data = b"\xff" * length
    content[second + 12 : second + 12 + length] = data
    checksum = tfrecord_index.tfrecord.masked_crc(data).to_bytes(4, "little")
    content[second + 12 + length : second + 16 + length] = checksum
    shard.write_bytes(content)
    assert main(["prepare", "--index", digits, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**COUNTS, "damaged records": 1}
    found = records.Records(records.find_builder("digits", root), "train")
    block = found.block([5, 1, 0, 2])
    assert [isinstance(one, records.BadRecord) for one in block] == [False, True, True, False]
    for index in (0, 1):
        with pytest.raises(
            records.BadRecord, match=f"record {index} of digits/1.0.0 train .*{shard}"
        ):
            found[index]

    def batches(place, **options):
        source = images.open_split(schema.Images(dir=place, **options), "train", train=True)
        return loader.train_batches(source, batch_size=64, seed=0, start=0, stop=1437 // 64)

    with pytest.raises(records.BadRecord, match=f"{shard}"):
        list(batches(root, max_bad_records=1))
    for there, here in zip(batches(root, max_bad_records=2), batches(data_dir), strict=True):
        np.testing.assert_array_equal(there["index"], here["index"])
        np.testing.assert_array_equal(there["mask"], here["index"] > 1)


def test_a_shard_replaced_while_training_is_named(digits, root):
    tfrecord_index.prepare(digits)
    source = records.Records(records.find_builder("digits", root), "train")
    shard = epath.Path(digits) / SHARD
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(ValueError, match=f"{shard}.* --index {digits}`") as error:
        source.block(range(700, 720))
    assert not isinstance(error.value, records.BadRecord)
