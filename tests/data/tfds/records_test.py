# SPDX-License-Identifier: Apache-2.0
"""Hostile names and damaged descriptions are refused by name; one bad record moves no other."""

import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.tfds import prepare
from localglobal_jax.data.tfds.records import BadRecord, data_root, find_builder

SIZE, BAD, BATCH, STEPS = 7, 3, 4, 5
FILE = "photos-train.array_record-00000-of-00001"


def record(image, label):
    example = tf_example_pb2.Example()
    for key, value in (("image", image), ("label", label)):
        items = value if isinstance(value, list) else [value]
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(items[0])]
        getattr(example.features.feature[key], kind).value.extend(items)
    return example.SerializeToString()


def png(seed, size=(9, 11)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


GOOD = [record(png(i), i) for i in range(SIZE)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_tfds):
    """A set that may be written anew, and the batches of `GOOD`, its records."""
    root = tmp_path_factory.mktemp("photos")
    make_tfds(root, "photos", [(png(i), i) for i in range(SIZE)], channels=3)
    put(root, GOOD)
    return root, batches(root)


def put(root, contents):
    path = root / "photos" / "1.0.0" / FILE
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def batches(root, **options):
    chosen = Images(name="photos", dir=str(root), image_size=(8, 8), crop="resized", **options)
    source = pipeline.open_split(chosen, "train", train=True)
    found = loader.train_batches(source, batch_size=BATCH, seed=1, start=0, stop=STEPS)
    return list(found)


BAD_RECORDS = st.one_of(
    st.binary(max_size=200),
    st.builds(record, st.binary(max_size=100), st.integers(-(2**63), 2**63 - 1)),
    st.builds(record, st.just(png(0)), st.floats()),  # int() would make labels of some
    st.builds(record, st.just(png(0)), st.sampled_from([b"3", [1, 2], [0.5, 1.5], -1, 10])),
    st.builds(lambda cut: record(png(0)[:cut], 1), st.integers(0, len(png(0)) - 20)),
    st.sampled_from([record(7, 1), record([png(0), png(1)], 1), record(1.5, 1), b""]),
)


@settings(deadline=None, max_examples=25)
@given(bad=BAD_RECORDS, in_memory=st.booleans())
def test_a_bad_record_is_named_or_skipped_and_moves_no_other(photos, bad, in_memory):
    root, clean = photos
    put(root, [*GOOD[:BAD], bad, *GOOD[BAD + 1 :]])
    with pytest.raises(BadRecord, match=rf"record {BAD} of photos/1.0.0 train .*{FILE}"):
        batches(root, in_memory=in_memory)
    found = batches(root, in_memory=in_memory, max_bad_records=1)
    for batch, wanted in zip(found, clean, strict=True):
        others = wanted["index"] != BAD
        assert not batch["mask"][~others].any() and not batch["image"][~others].any()
        np.testing.assert_array_equal(batch["index"], wanted["index"])
        for key in wanted:
            np.testing.assert_array_equal(batch[key][others], wanted[key][others], strict=True)


# ------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "digits/../../x", "digits/data_dir=x", "digits/a=b", "ns:digits",
     "huggingface:glue", "gs://bucket/x", "a;rm -rf x", "$(touch x)", "digits\n", "", "x" * 5000,
     "digits:1.0.0/../..", "dig\0its"],
)  # fmt: skip
def test_hostile_names_are_no_names(tmp_path, name):
    with pytest.raises(ValueError, match="TFDS"):
        find_builder(name, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "root",
    [
        "gs:/x",
        "gs://bucket",
        "gs://",
        "s3://x",
        "http://x/y",
        "gs://b/a#1",
        "a\0b",
        "~nobody-here/x",
    ],
)
def test_data_directories_are_local_or_in_a_bucket(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a folder named gs: would be made
    with pytest.raises(ValueError, match=r"data\.dir"):
        pipeline.open_split(Images(dir=root), "train", train=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TFDS_DATA_DIR", root.replace("\0", "://"))
    with pytest.raises(ValueError, match="TFDS_DATA_DIR"):
        data_root(None)


def test_a_data_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot make .*/file/digits \(.*data\.dir or --dir"):
        pipeline.open_split(Images(dir=str(tmp_path / "file")), "train", train=True)


# ------------------------------------------------------------------- what a set says of itself


@pytest.fixture
def described(photos, tmp_path):
    root, _ = photos
    shutil.copytree(root / "photos", tmp_path / "photos")
    return tmp_path / "photos" / "1.0.0"


def opened(described):
    options = Images(name="photos", dir=str(described.parents[1]))
    return pipeline.open_split(options, "train", train=True)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), name=st.sampled_from(["dataset_info.json", "features.json"]))
def test_a_damaged_description_is_named(photos, tmp_path_factory, data, name):
    root, _ = photos
    target = tmp_path_factory.mktemp("x") / "photos" / "1.0.0"
    shutil.copytree(root / "photos" / "1.0.0", target)
    content = bytearray((target / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 5))]
    else:
        content[data.draw(st.integers(0, len(content) - 3))] = data.draw(st.integers(128, 255))
    (target / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(target.parent)):
        opened(target)


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"[" * 100_000, None])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_no_description_is_named(described, name, content):
    (described / name).unlink()
    if content is None:
        (described / name).mkdir()
    else:
        (described / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(described.parent)):
        opened(described)


def test_a_set_whose_config_is_called_incomplete_is_checked(described, tmp_path, monkeypatch):
    (tmp_path / "hostile_code.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (described / "features.json").read_text()
    own = "tensorflow_datasets.core.features.image_feature.Image"
    (described / "features.json").write_text(text.replace(own, "hostile_code.Image"))
    shutil.copytree(described, described.parent / "incomplete.x" / "1.0.0")
    (described.parent / ".config").mkdir()
    about = json.dumps({"default_config_name": "incomplete.x"})
    (described.parent / ".config" / "metadata.json").write_text(about)
    shutil.rmtree(described)
    with pytest.raises(ValueError, match=r"hostile_code\.Image"):
        opened(described)
    assert "hostile_code" not in sys.modules


@pytest.mark.parametrize("escaped", [False, True])
def test_a_set_cannot_have_code_imported(described, escaped, tmp_path, monkeypatch):
    (tmp_path / "hostile_code.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (described / "features.json").read_text()
    own = "tensorflow_datasets.core.features.image_feature.Image"
    text = text.replace(own, "hostile_code.Image")
    if escaped:
        text = text.replace("pythonClassName", "\\u0070ythonClassName")
    (described / "features.json").write_text(text)
    with pytest.raises(ValueError, match=r"features\.json .*hostile_code\.Image"):
        opened(described)
    assert "hostile_code" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [{"name": "../../evil"}, {"filepathTemplate": "../../{DATASET}-{SPLIT}"},
     {"filepathTemplate": "/etc/passwd"}],
)  # fmt: skip
def test_files_of_a_set_lie_in_its_folder(described, change):
    info = json.loads((described / "dataset_info.json").read_text())
    (info if "name" in change else info["splits"][0]).update(change)
    (described / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError) as error:
        opened(described)
    assert "Delete" not in str(error.value) or f"Delete {described} and" in str(error.value)


def test_a_twin_stays_in_its_data_directory(described, make_tfrecord, tmp_path):
    origin = make_tfrecord(described, tmp_path / "origin" / "1.0.0")
    info = json.loads((origin / "dataset_info.json").read_text())
    for change in ({"name": "../../evil"}, {"name": "/tmp/evil"}, {"configName": "../../evil"}):
        (origin / "dataset_info.json").write_text(json.dumps({**info, **change}))
        before = {p for p in tmp_path.rglob("*")}
        with pytest.raises(ValueError):
            prepare.from_tfrecord(str(origin), str(tmp_path / "a" / "b"))
        assert {p for p in tmp_path.rglob("*")} - before <= {tmp_path / "a", tmp_path / "a" / "b"}
