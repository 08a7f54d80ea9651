# SPDX-License-Identifier: Apache-2.0
"""TFRecord to ArrayRecord, from and to a disk and a bucket: shard by shard, and resumed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath

from localglobal_jax.cli.main import main
from localglobal_jax.data.tfds import gcs, prepare, records

SHARDS = 4
COUNTS = {"train": 1437, "test": 360}
ONE = "digits-train.tfrecord-00001-of-00004"


@pytest.fixture(scope="module")
def original(data_dir):
    return pathlib.Path(data_dir, "digits/1.0.0")


@pytest.fixture(scope="module")
def tfrecord(original, tmp_path_factory, make_tfrecord_shards):
    """The digits as TFRecord, the training split in several shards; tests do not change it."""
    root = tmp_path_factory.mktemp("tfrecord")
    return make_tfrecord_shards(original, root / "digits/1.0.0", SHARDS)


def put(folder, target):
    """Copies a version of a data set, past the code under test."""
    for path in pathlib.Path(folder).iterdir():
        epath.Path(target, path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture
def places(bucket, tmp_path, tfrecord):
    """Functions that give a TFRecord directory of one's own, and a data directory to fill."""

    def origin(kind):
        folder = f"{bucket}/old/digits/1.0.0" if kind == "bucket" else tmp_path / "old/digits/1.0.0"
        epath.Path(folder).mkdir(parents=True)
        return str(put(tfrecord, folder))

    def target(kind):
        return f"{bucket}/new" if kind == "bucket" else str(tmp_path / "new")

    return origin, target


def read(root):
    builder = records.find_builder("digits", root)
    return {
        split: [record["image"] for record in records.Records(builder, split).block(range(n))]
        for split, n in COUNTS.items()
    }


def names(root):
    folder = epath.Path(root) / "digits"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


KINDS = [(old, new) for old in ("disk", "bucket") for new in ("disk", "bucket")]


@pytest.mark.parametrize(("old", "new"), KINDS)
def test_the_twin_holds_the_same_records(places, data_dir, old, new, capsys):
    origin, target = (place(kind) for place, kind in zip(places, (old, new), strict=True))
    assert main(["prepare", "--from_tfrecord", origin, "--dir", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == COUNTS
    assert read(target) == read(data_dir)
    assert names(target) == ["1.0.0"]
    files = sorted(path.name for path in (epath.Path(target) / "digits/1.0.0").iterdir())
    assert len(files) == SHARDS + 1 + 2 and all("tfrecord" not in name for name in files)
    for path in epath.Path(target, "digits/1.0.0").iterdir():  # the bytes of other readers, too
        if "train" in path.name:
            reader = array_record_module.ArrayRecordReader(os.fspath(path))
            assert reader.num_records() in (359, 360)


def converted(monkeypatch):
    """The names of shards that are converted from here on."""
    found, convert = [], prepare._convert_shard

    def noted(shard, target):
        found.append(shard.path.name)
        convert(shard, target)

    monkeypatch.setattr(prepare, "_convert_shard", noted)
    return found


@pytest.mark.parametrize(("old", "new"), KINDS)
def test_a_damaged_shard_makes_no_twin_and_the_others_are_made_once(places, monkeypatch, old, new):
    origin, target = (place(kind) for place, kind in zip(places, (old, new), strict=True))
    path = epath.Path(origin) / ONE
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(ValueError, match=rf"{path}: record \d+ "):
        prepare.from_tfrecord(origin, target)
    with pytest.raises(ValueError, match=target):
        records.Records(records.find_builder("digits", target), "train")
    path.write_bytes(whole)
    again = converted(monkeypatch)
    assert prepare.from_tfrecord(origin, target) == COUNTS
    assert ONE in again and len(again) < SHARDS + 1
    del again[:]
    assert prepare.from_tfrecord(origin, target) == COUNTS
    assert again == []


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_shard_made_of_a_file_that_has_changed_is_made_again(places, monkeypatch, kind):
    origin, target = (place(kind) for place in places)
    first, second = (epath.Path(origin) / ONE.replace("00001", n) for n in ("00000", "00001"))
    content = second.read_bytes()
    second.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=f"{second}"):
        prepare.from_tfrecord(origin, target)
    second.write_bytes(content)
    others = first.read_bytes()
    size = int.from_bytes(others[:8], "little") + 16
    first.write_bytes(others[size:] + others[:size])  # its first record comes last
    again = converted(monkeypatch)
    prepare.from_tfrecord(origin, target)
    assert {first.name, second.name} <= set(again)
    images = read(target)["train"]
    assert images[359] == read_first(others)


def read_first(framed):
    from localglobal_jax.data.tfds.records import _parse

    length = int.from_bytes(framed[:8], "little")
    return _parse(framed[12 : 12 + length])["image"]


KILLED = """
    import os, signal, sys
    from localglobal_jax.data.tfds import prepare
    convert, left = prepare._convert_shard, [int(sys.argv[3])]
    os.cpu_count = lambda: 1
    def deadly(shard, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        convert(shard, target)
    prepare._convert_shard = deadly
    prepare.from_tfrecord(*sys.argv[1:3])
"""


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_killed_it_goes_on_where_it_was(places, monkeypatch, data_dir, kind):
    origin, target = (place(kind) for place in places)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), origin, target, "2"]
    done = subprocess.run(command, check=False, capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(ValueError, match=target):
        records.Records(records.find_builder("digits", target), "train")
    again = converted(monkeypatch)
    assert prepare.from_tfrecord(origin, target) == COUNTS
    assert len(again) == SHARDS + 1 - 2
    assert names(target) == ["1.0.0"]
    assert read(target) == read(data_dir)


def test_killed_while_it_gives_files_their_names(places, monkeypatch, data_dir):
    origin, target = (place("disk") for place in places)
    names_given, rename = [], pathlib.Path.rename

    def ends(self, other):
        if "incomplete" not in self.name:
            names_given.append(other.name)
        if len(names_given) == 3:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(pathlib.Path, "rename", ends)
    with pytest.raises(KeyboardInterrupt):
        prepare.from_tfrecord(origin, target)
    monkeypatch.setattr(pathlib.Path, "rename", rename)
    assert len(names_given) == 3
    assert prepare.from_tfrecord(origin, target) == COUNTS
    assert read(target) == read(data_dir)
    assert len(list(pathlib.Path(target, "digits/1.0.0").iterdir())) == SHARDS + 1 + 2


@pytest.mark.slow  # in the suite two at once prepare the digits in a bucket, see below
def test_two_at_once_into_a_bucket(places, data_dir):
    origin, target = (place("bucket") for place in places)
    code = "import sys; from localglobal_jax.data.tfds import prepare; "
    code += "print(prepare.from_tfrecord(*sys.argv[1:]))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, origin, target], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=600)[0].decode().strip() == str(COUNTS)
    assert read(target) == read(data_dir)


@pytest.mark.parametrize("directory", ["gs:/x", "gs://bucket", "gs://no-such-bucket-here/x/1.0.0"])
def test_a_directory_that_is_none_ends_in_one_line(gcs, directory, tmp_path, capsys):
    del gcs
    command = ["prepare", "--from_tfrecord", directory, f"--dir={tmp_path}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert directory in line
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_to_write_to_that_does_not_exist(tfrecord, gcs, capsys):
    del gcs
    target = "gs://no-such-bucket-here/x"
    assert main(["prepare", "--from_tfrecord", str(tfrecord), f"--dir={target}"]) == 2
    assert target in capsys.readouterr().err


def test_a_bucket_is_no_twin_of_itself(places, bucket):
    origin = places[0]("bucket")
    for root in (f"{bucket}/old", f"{bucket}/old/"):
        with pytest.raises(ValueError, match="--dir"):
            prepare.from_tfrecord(origin, root)


# ------------------------------------------------------------------------- prepared in a bucket


def test_two_attempts_at_once_prepare_the_embedded_digits_in_a_bucket(bucket, data_dir):
    code = "import sys; from localglobal_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "prepare", "--json"]
    command += ["--config=configs/coatnet_digits.py", f"--dir={bucket}"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert json.loads(process.communicate(timeout=600)[0]) == COUNTS
    assert names(bucket) == ["1.0.0"]
    assert read(bucket) == read(data_dir)


def test_a_killed_upload_is_an_unprepared_set_that_the_next_attempt_finishes(
    bucket, data_dir, monkeypatch
):
    """Ends the attempt in each of its writes in turn; what is there is not written again."""
    writes, put_file = [], gcs.put

    def ends(at):
        def put_or_end(file, target, **metadata):
            if len(writes) == at:
                raise KeyboardInterrupt
            writes.append(target)
            put_file(file, target, **metadata)

        return put_or_end

    monkeypatch.setattr(gcs, "UPLOADS", 1)
    for at in range(4):
        monkeypatch.setattr(gcs, "put", ends(at))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("digits", bucket)
        assert not records.is_prepared(records.find_builder("digits", bucket))
    monkeypatch.setattr(gcs, "put", ends(-1))
    assert prepare.prepare("digits", bucket) == COUNTS
    assert [target.rpartition("/")[2] for target in writes] == [
        "digits-test.array_record-00000-of-00001",
        "digits-train.array_record-00000-of-00001",
        "features.json",
        "dataset_info.json",
    ]
    assert read(bucket) == read(data_dir)


def test_other_bytes_under_a_name_are_replaced(bucket):
    place = epath.Path(bucket) / "digits/1.0.0" / "digits-test.array_record-00000-of-00001"
    place.write_bytes(b"of another program")
    assert prepare.prepare("digits", bucket) == COUNTS
    assert np.mean([len(image) for image in read(bucket)["test"]]) > 50
