# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
from array_record.python import array_record_module

from localglobal_jax.data.tfds.prepare import from_tfrecord, prepare, verify
from localglobal_jax.data.tfds.records import find_builder

COUNTS = {"train": 1437, "test": 360}
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(code, *arguments, **kwargs):
    """A real process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def files(root):
    return sorted(str(p.relative_to(root)) for p in pathlib.Path(root).rglob("*") if p.is_file())


def read(path):
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    return records


def test_twice_is_once(tmp_path):
    assert prepare("digits", str(tmp_path)) == COUNTS
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)}
    assert prepare("digits", str(tmp_path)) == COUNTS
    assert before == {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)}
    assert {path.parts[:2] for path in map(pathlib.Path, before)} == {("digits", "1.0.0")}


# ------------------------------------------------------------------------------------- killed

KILL = """
    import os, signal, sys
    from etils import epath
    import tensorflow_datasets as tfds
    from localglobal_jax.data.tfds.prepare import prepare
    from localglobal_jax.data.tfds.builders.digits import Digits

    def die_in(owner, name, when=lambda *args: True):
        original = getattr(owner, name)
        def replacement(*args, **kwargs):
            if when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, replacement)

    stage, root = sys.argv[1:]
    if stage == "generating":
        die_in(Digits, "_generate_examples", lambda self, indices, *rest: len(indices) == 360)
    elif stage == "describing":
        die_in(tfds.core.DatasetInfo, "write_to_directory")
    elif stage == "renaming":
        die_in(os, "rename")
        die_in(type(epath.Path(".")), "rename")
    elif stage == "renamed":
        die_in(Digits, "_post_download_and_prepare_hook")
    prepare("digits", root)
"""


@pytest.mark.parametrize("stage", ["generating", "describing", "renaming", "renamed"])
def test_killed_at_any_stage_leaves_nothing_half_made(tmp_path, stage):
    process = run(KILL, stage, tmp_path)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    whole = (tmp_path / "digits/1.0.0/dataset_info.json").exists()
    assert whole == (stage == "renamed")
    if stage != "renamed":
        assert list((tmp_path / "digits").glob("incomplete.*"))  # it did die in the middle
    assert prepare("digits", str(tmp_path)) == COUNTS
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_two_at_once_both_succeed(tmp_path):
    code = """
        import sys
        from localglobal_jax.data.tfds.prepare import prepare
        print(prepare("digits", sys.argv[1]))
    """
    both = [run(code, tmp_path) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.strip() == str(COUNTS)  # and nothing else: what TFDS prints goes to stderr
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


# ------------------------------------------------------------------------------------ verified


@pytest.fixture
def copy(data_dir, tmp_path):
    return pathlib.Path(shutil.copytree(f"{data_dir}/digits/1.0.0", tmp_path / "digits/1.0.0"))


def test_a_file_that_lost_records_is_found(copy, tmp_path):
    path = copy / "digits-test.array_record-00000-of-00001"
    records = read(path)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records[:-3]:
        writer.write(record)
    writer.close()
    with pytest.raises(ValueError, match=rf"{path} .*357.*360"):
        prepare("digits", str(tmp_path))


def test_a_directory_without_its_description_is_refused(copy, tmp_path):
    (copy / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=f"{copy}.*dataset_info.json"):
        prepare("digits", str(tmp_path))


def test_what_is_not_there_is_not_verified(tmp_path):
    with pytest.raises(ValueError, match=r"Run `localglobal prepare digits --dir .*`"):
        verify(find_builder("digits", str(tmp_path)))


def test_unknown_names_touch_nothing(tmp_path):
    with pytest.raises(ValueError, match="fashion_mnist"):
        prepare("fashionmnist", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_set_that_needs_hand_made_downloads_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"could not prepare imagenet2012|needs a package"):
        prepare("imagenet2012", str(tmp_path), str(tmp_path))
    assert not (tmp_path / "imagenet2012").exists()


def test_the_data_directory_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "here"))
    assert prepare("digits") == COUNTS
    assert (tmp_path / "here/digits/1.0.0").is_dir()


# ------------------------------------------------------------------------------ from TFRecord


@pytest.fixture
def tfrecord(data_dir, tmp_path, make_tfrecord):
    prepared = pathlib.Path(data_dir, "digits/1.0.0")
    return make_tfrecord(prepared, tmp_path / "old/digits/1.0.0")


def test_the_twin_holds_the_same_records(tfrecord, data_dir, tmp_path):
    assert from_tfrecord(str(tfrecord), str(tmp_path / "new")) == COUNTS
    twin = tmp_path / "new/digits/1.0.0"
    original = pathlib.Path(data_dir, "digits/1.0.0")
    assert files(twin) == files(original)
    for path in twin.glob("*.array_record*"):
        assert read(path) == read(original / path.name)
    assert [p.name for p in twin.parent.iterdir()] == ["1.0.0"]
    assert prepare("digits", str(tmp_path / "new")) == COUNTS
    assert from_tfrecord(str(tfrecord), str(tmp_path / "new")) == COUNTS  # only verified


def test_tfrecord_without_an_index_cannot_be_read_at_random(tfrecord, tmp_path):
    for way in (f"--from_tfrecord {tfrecord} --dir", f"--index {tfrecord}`"):
        with pytest.raises(ValueError, match=f"localglobal prepare {way}"):
            prepare("digits", str(tmp_path / "old"))
    with pytest.raises(ValueError, match="--dir"):
        from_tfrecord(str(tfrecord), str(tmp_path / "old"))


@pytest.mark.parametrize("damage", ["byte", "record"])
def test_damaged_tfrecords_make_no_twin(tfrecord, tmp_path, damage):
    path = tfrecord / "digits-test.tfrecord-00000-of-00001"
    data = path.read_bytes()
    if damage == "byte":
        path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
        message = r"record \d+ has damaged"
    else:
        length = int.from_bytes(data[:8], "little")
        path.write_bytes(data[length + 16 :])
        message = "holds 359 records, its dataset_info.json says 360"
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        from_tfrecord(str(tfrecord), str(tmp_path / "new"))
    (staging,) = (tmp_path / "new/digits").iterdir()  # with the undamaged shard
    assert staging.name.startswith("incomplete.")
    assert [file.name[:12] for file in staging.iterdir() if "incomplete" not in file.name] == [
        "digits-train"
    ]


def test_killed_while_converting(tfrecord, tmp_path):
    code = """
        import os, signal, sys
        from localglobal_jax.data.tfds import prepare
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        prepare.json.dumps = die
        prepare.from_tfrecord(*sys.argv[1:])
    """
    process = run(code, tfrecord, tmp_path / "new")
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert [p.name[:11] for p in (tmp_path / "new/digits").iterdir()] == ["incomplete."]
    assert from_tfrecord(str(tfrecord), str(tmp_path / "new")) == COUNTS
    assert [p.name for p in (tmp_path / "new/digits").iterdir()] == ["1.0.0"]


def test_not_a_tfds_directory(tmp_path, data_dir):
    with pytest.raises(ValueError, match=r"dataset_info\.json"):
        from_tfrecord(str(tmp_path))
    with pytest.raises(ValueError, match="array_record"):
        from_tfrecord(f"{data_dir}/digits/1.0.0", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------- without TensorFlow


def test_none_of_this_imports_tensorflow(tfrecord, tmp_path):
    """A stand-in is found where TensorFlow would be, and fails as soon as it is imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('imports tensorflow')")
    code = """
        import importlib.util, sys
        from localglobal_jax.data import loader
        from localglobal_jax.data.images import device_ops, pipeline as images
        from localglobal_jax.data.tfds import prepare
        from localglobal_jax.config.schema import Images
        old, new, fresh = sys.argv[1:]
        prepare.from_tfrecord(old, new)
        prepare.prepare("digits", fresh)
        for kwargs in (dict(dir=new, in_memory=False), dict(dir=fresh), dict(mock=True)):
            options = Images(crop="pad", pad=1, flip=True, randaugment_layers=1, **kwargs)
            source = images.open_split(options, "train", train=True)
            list(loader.train_batches(source, batch_size=8, seed=0, start=0, stop=2))
        try:
            prepare.prepare("digit", fresh)
        except ValueError:
            print(importlib.util.find_spec("tensorflow").origin, "tensorflow" in sys.modules)
    """
    process = run(code, tfrecord, tmp_path / "new", tmp_path / "fresh", cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert out.strip() == f"{tmp_path}/tensorflow/__init__.py False", err
