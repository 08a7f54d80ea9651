# SPDX-License-Identifier: Apache-2.0
import gzip
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from localglobal_jax.data.tfds.builders import debian, fashion_mnist
from localglobal_jax.data.tfds.prepare import prepare

COUNTS = {"train": 30, "test": 10}


def idx(array):
    shape = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Files like Fashion-MNIST's, the test half without gzip; split -> (images, labels)."""
    monkeypatch.setattr(fashion_mnist, "COUNTS", COUNTS)
    rng, written, source = np.random.default_rng(0), {}, tmp_path / "raw"
    source.mkdir()
    for split, stems in fashion_mnist.FILES.items():
        n = COUNTS[split]
        arrays = (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8))
        for stem, array in zip(stems, arrays, strict=True):
            if split == "train":
                (source / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (source / stem).write_bytes(idx(array))
        written[split] = arrays
    return source, written


def test_prepared_under_its_standard_name(tmp_path, small):
    source, written = small
    assert prepare("fashion_mnist", str(tmp_path / "tfds"), str(source)) == COUNTS
    assert [p.name for p in (tmp_path / "tfds/fashion_mnist").iterdir()] == ["3.0.1"]
    for split, (images, labels) in written.items():
        read = tfds.data_source("fashion_mnist:3.0.1", split=split, data_dir=tmp_path / "tfds")
        found = {(e["image"].tobytes(), int(e["label"])) for e in read}
        assert found == {(i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True)}
        assert read.dataset_info.features["label"].int2str(9) == "Ankle boot"


def test_missing_files_are_listed_before_anything_is_written(tmp_path, small):
    source, _ = small
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="missing t10k-labels-idx1-ubyte"):
        prepare("fashion_mnist", str(tmp_path / "tfds"), str(source))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare("fashion_mnist", str(tmp_path / "tfds"), str(tmp_path / "nowhere"))
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:3], lambda b: b"", lambda b: b"\1" + b]
)
def test_damaged_files_are_named(tmp_path, small, damage):
    source, _ = small
    path = source / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: not an IDX file of 10 items"):
        prepare("fashion_mnist", str(tmp_path / "tfds"), str(source))
    assert not (tmp_path / "tfds/fashion_mnist").exists()


def test_tfds_itself_is_asked_where_there_is_no_package(tmp_path, small, monkeypatch):
    """The download itself is TFDS's; its files arrive unpacked and in our hands."""
    source, _ = small
    monkeypatch.setattr(debian.Files, "find", lambda self, config, staging: None)
    asked = []

    def download_and_extract(self, urls):
        asked.extend(urls.values())
        files = {path.name.removesuffix(".gz"): path for path in source.iterdir()}
        return {key: files[url.rpartition("/")[2].removesuffix(".gz")] for key, url in urls.items()}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download_and_extract)
    monkeypatch.setattr(
        "tensorflow_datasets.image_classification.mnist._TRAIN_EXAMPLES", COUNTS["train"]
    )
    monkeypatch.setattr(
        "tensorflow_datasets.image_classification.mnist._TEST_EXAMPLES", COUNTS["test"]
    )
    assert prepare("fashion_mnist", str(tmp_path / "tfds")) == COUNTS
    assert len(asked) == 4 and all("fashion-mnist" in url for url in asked)


@pytest.mark.slow
def test_the_real_one_from_debian(tmp_path):
    """Needs Debian's package, or apt-get and a network."""
    if not pathlib.Path(fashion_mnist.INSTALLED).is_dir() and not shutil.which("apt-get"):
        pytest.skip("no apt-get here")
    counts = prepare("fashion_mnist", str(tmp_path))
    assert counts == {"train": 60_000, "test": 10_000}
    assert [p.name for p in (tmp_path / "fashion_mnist").iterdir()] == ["3.0.1"]
    read = tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path)
    labels = [read[i]["label"] for i in range(0, 10_000, 10)]
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("cut", [3, 12, 20, -9, -1])
def test_a_damaged_or_endless_archive_is_named(tmp_path, cut):
    whole = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(range(9)))
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=str(file)):
        fashion_mnist.read_idx(file, 9)
    broken = bytearray(whole)
    broken[12] ^= 255
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=str(file)):
        fashion_mnist.read_idx(file, 9)
    file.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + bytes(fashion_mnist.LARGEST * 3)))
    with pytest.raises(ValueError, match=r"47040012 bytes follow|not an IDX file"):
        fashion_mnist.read_idx(file, 9)
