# SPDX-License-Identifier: Apache-2.0
"""Data sets in a bucket: the same records as on disk, and the same errors, from a real server."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath

from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.tfds import array_records, records

SHARD = "digits-train.array_record-00000-of-00001"


def put(folder, target):
    """Copies a local directory, past the code under test."""
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            (epath.Path(target) / path.relative_to(folder)).write_bytes(path.read_bytes())


@pytest.fixture
def digits(data_dir, bucket):
    """A data directory in a bucket with the digits, version 1.0.0."""
    put(f"{data_dir}/digits", f"{bucket}/digits")
    return bucket


@pytest.fixture
def photos(make_tfds, tmp_path, bucket):
    """A data directory in a bucket with a set that no code of TFDS describes."""
    png = cv2.imencode(".png", np.zeros((3, 3), np.uint8))[1].tobytes()
    put(make_tfds(tmp_path, "photos", [(png, 1)] * 4).parent, f"{bucket}/photos")
    return bucket


def opened(root, split="train"):
    return records.Records(records.find_builder("digits", root), split)


def batches(root, stop=3, **options):
    source = pipeline.open_split(Images(dir=root, **options), "train", train=True)
    return list(loader.train_batches(source, batch_size=8, seed=0, start=0, stop=stop))


def rewrite(shard, change):
    """Writes a shard anew, its records changed."""
    local = pathlib.Path(change.__name__)
    local.write_bytes(epath.Path(shard).read_bytes())
    reader = array_record_module.ArrayRecordReader(str(local))
    found = change(reader.read_all())
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
    for record in found:
        writer.write(record)
    writer.close()
    epath.Path(shard).write_bytes(local.read_bytes())


# ------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("split", ["train", "test", "train[10:90%]", "train[:3]+test[5:]"])
def test_records_are_those_on_disk(digits, data_dir, split):
    there, here = opened(digits, split), opened(data_dir, split)
    order = np.random.default_rng(0).permutation(len(here))[:200].tolist()
    assert len(there) == len(here)
    assert there.block(order) == here.block(order)
    assert there[order[0]] == here[order[0]]


def test_the_environment_may_name_a_bucket(digits, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", digits)
    for there, here in zip(batches(None), batches(data_dir), strict=True):
        for key in here:
            np.testing.assert_array_equal(there[key], here[key], strict=True)


def test_a_copy_in_another_process_reads_the_same(digits):
    """Workers get the source by pickle; they do not inherit opened files."""
    parts = opened(digits)._parts
    files = array_records.ArrayRecordFiles(parts, epath.Path(f"{digits}/digits/1.0.0"))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read([(0, 5), (0, 700)]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(files),
        capture_output=True,
        check=True,
        timeout=600,
    )
    assert done.stdout.decode().strip() == str(files.read([(0, 5), (0, 700)]))


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("root", ["gs:/x", "gs://bucket", "gs://no-such-bucket-here/x"])
def test_a_data_directory_that_is_none_ends_in_one_line(gcs, root, tmp_path, capsys):
    command = ["train", "--config=configs/coatnet_digits.py:size=tiny", f"--workdir={tmp_path}/w"]
    assert main([*command, f"--config.data.dir={root}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert root in line
    assert main(["prepare", "digits", f"--dir={root}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert root in line
    assert not pathlib.Path("gs:").exists()


def test_another_version_is_named(digits):
    with pytest.raises(ValueError, match=r"digits.*2\.0\.0"):
        records.find_builder("digits:2.0.0", digits)
    old = epath.Path(digits) / "digits/1.0.0"
    for path in list(old.iterdir()):
        (old.parent / "0.9.0" / path.name).write_bytes(path.read_bytes())
        path.unlink()
    with pytest.raises(ValueError, match=r"digits:0\.9\.0"):
        records.Records(records.find_builder("digits", digits), "train")


def test_a_shard_cut_short_is_named(digits):
    shard = epath.Path(digits) / "digits/1.0.0" / SHARD
    shard.write_bytes(shard.read_bytes()[:200_000])
    with pytest.raises(ValueError, match=rf"{shard} .* 1437"):
        opened(digits)


def test_a_shard_that_lost_records_is_named(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard = f"{digits}/digits/1.0.0/{SHARD}"

    def without_three(found):
        return found[:-3]

    rewrite(shard, without_three)
    with pytest.raises(ValueError, match=rf"{shard} .*1434.*1437"):
        opened(digits)


def test_a_missing_shard_is_named(digits):
    shard = epath.Path(digits) / "digits/1.0.0" / SHARD
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}"):
        opened(digits)


def test_bad_records_are_counted_and_masked_as_on_disk(digits, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def with_a_bad_one(found):
        return [*found[:7], b"garbage", *found[8:]]

    rewrite(f"{digits}/digits/1.0.0/{SHARD}", with_a_bad_one)
    with pytest.raises(records.BadRecord, match=f"record 7 of digits/1.0.0 train .*{digits}"):
        batches(digits)
    epoch = 1437 // 8
    found = batches(digits, stop=epoch, max_bad_records=1)
    assert any(7 in batch["index"] for batch in found)
    for there, here in zip(found, batches(data_dir, stop=epoch), strict=True):
        np.testing.assert_array_equal(there["index"], here["index"])
        np.testing.assert_array_equal(there["mask"], here["index"] != 7)


def replaced(digits, tmp_path, monkeypatch, change):
    """A source whose shard was replaced after it was opened, by one of as many records."""
    monkeypatch.chdir(tmp_path)
    source = opened(digits)
    rewrite(f"{digits}/digits/1.0.0/{SHARD}", change)
    return source


def test_a_shard_replaced_while_it_is_read_is_no_bad_record(digits, tmp_path, monkeypatch):
    def padded(found):  # records lie elsewhere, so that reading by the old places fails
        return [record + bytes(1000) for record in found]

    source = replaced(digits, tmp_path, monkeypatch, padded)
    with pytest.raises(ValueError, match=f"{digits}/digits/1.0.0/{SHARD}.*generation") as error:
        source.block(range(700, 720))
    assert not isinstance(error.value, records.BadRecord)


def test_a_shard_replaced_by_one_that_reads_well_is_found_in_time(digits, tmp_path, monkeypatch):
    def same(found):
        return found

    source = replaced(digits, tmp_path, monkeypatch, same)
    assert len(source.block(range(4))) == 4
    monkeypatch.setattr(records, "LISTED_EVERY", 0)
    with pytest.raises(ValueError, match=f"{digits}/digits/1.0.0/{SHARD}.*generation"):
        source.block(range(4))


def test_a_set_in_a_bucket_cannot_have_code_imported(digits, tmp_path, monkeypatch):
    (tmp_path / "hostile_code.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = epath.Path(digits) / "digits/1.0.0/features.json"
    own = "tensorflow_datasets.core.features.image_feature.Image"
    path.write_text(path.read_text().replace(own, "hostile_code.Image"))
    with pytest.raises(ValueError, match=r"features\.json .*hostile_code\.Image"):
        opened(digits)
    assert "hostile_code" not in sys.modules


@pytest.mark.parametrize("template", ["../../{DATASET}-{SPLIT}", "/etc/passwd", "gs://b/x"])
def test_files_of_a_set_in_a_bucket_lie_in_its_folder(digits, template):
    path = epath.Path(digits) / "digits/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["filepathTemplate"] = template
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f"{digits}"):
        opened(digits, info["splits"][0]["name"])


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_in_a_bucket_is_named(photos, name, content):
    (epath.Path(photos) / "photos/1.0.0" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{photos}/photos"):
        records.Records(records.find_builder("photos", photos), "train")


# -------------------------------------------------------------------------------- open files


def test_more_shards_than_the_system_lets_a_process_open_by_default(data_dir, tmp_path):
    """Each reader keeps its file open; systems allow 1,024, and ImageNet has 1,088 shards."""
    shutil.copy(f"{data_dir}/digits/1.0.0/{SHARD}", tmp_path / "0")
    for i in range(1, 120):
        (tmp_path / str(i)).hardlink_to(tmp_path / "0")
    code = """
        import pathlib, resource, sys, types
        from localglobal_jax.data.tfds.array_records import ArrayRecordFiles
        folder = pathlib.Path(sys.argv[1])
        parts = [
            types.SimpleNamespace(filename=str(path), examples_in_shard=1437)
            for path in folder.iterdir()
        ]
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        print(len(ArrayRecordFiles(parts, folder).read([(i, 0) for i in range(120)])))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.strip() == "120", done.stderr
