# SPDX-License-Identifier: Apache-2.0
import logging
import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.tfds.records import BadRecord

EVERYTHING = dict(flip=True, randaugment_layers=2, erase=0.5)


def train(options, steps=5, *, batch_size=24, hosts=1, start=0, seed=3):
    """Training batches, the hosts' parts put side by side."""
    parts = []
    for host in range(hosts):
        source = pipeline.open_split(options, "train", train=True)
        batches = loader.train_batches(
            source, batch_size=batch_size, seed=seed, start=start, stop=steps, shard=(host, hosts)
        )
        parts.append(list(batches))
    return [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]


def evaluate(options, split="test", batch_size=50):
    source = pipeline.open_split(options, split, train=False)
    batches = list(loader.eval_batches(source, batch_size=batch_size))
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


def test_digits_are_the_pixels_of_scikit_learn(data_dir):
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    known = {}
    for image, label in zip(values, labels, strict=True):
        known.setdefault(tuple(image.astype(int)), set()).add(int(label))
    options = Images(dir=data_dir)
    seen = [evaluate(options, "train"), evaluate(options, "test")]
    count = 0
    for split in seen:
        real = split["mask"] > 0
        count += real.sum()
        levels = np.rint(split["image"][real].reshape(-1, 64) * (16 / 255)).astype(int)
        for image, label in zip(levels, split["label"][real], strict=True):
            assert label in known[tuple(image)]
    assert count == 1797 and seen[1]["mask"].sum() == 360


def test_shapes_and_types(data_dir):
    options = Images(dir=data_dir, image_size=(12, 10), crop="pad", pad=2, **EVERYTHING)
    source = pipeline.open_split(options, "train", train=True)
    assert (len(source), source.classes, source.channels) == (1437, 10, 1)
    (batch,) = train(options, steps=1)
    found = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
    assert found == {
        "image": ((24, 12, 10, 1), "uint8"),
        "label": ((24,), "int32"),
        "mask": ((24,), "float32"),
        "index": ((24,), "int32"),
    }


@pytest.mark.parametrize("crop", [dict(crop="pad", pad=2), dict(crop="resized"), {}])
def test_hosts_memory_threads_and_resuming_change_no_pixel(data_dir, crop):
    def options(**kwargs):
        return Images(dir=data_dir, image_size=(10, 8), **crop, **EVERYTHING, **kwargs)

    whole = train(options())
    same(whole, train(options(in_memory=False)))
    same(whole, train(options(threads=1), hosts=3))
    same(whole[3:], train(options(), start=3))
    other = train(options(), seed=4)
    assert not np.array_equal(whole[0]["image"], other[0]["image"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentation_changes_pixels_and_no_labels(data_dir, in_memory):
    plain = train(Images(dir=data_dir, in_memory=in_memory))
    for kwargs in (
        dict(crop="pad", pad=1),
        dict(crop="resized"),
        dict(flip=True),
        dict(randaugment_layers=2),
        dict(erase=0.9),
    ):
        changed = train(Images(dir=data_dir, in_memory=in_memory, **kwargs))
        for a, b in zip(plain, changed, strict=True):
            np.testing.assert_array_equal(a["label"], b["label"])
            different = (a["image"] != b["image"]).any(axis=(1, 2, 3)).mean()
            assert different > 0.2


def test_each_epoch_augments_anew(data_dir):
    options = Images(dir=data_dir, crop="pad", pad=2)
    both = {}
    for batch in train(options, steps=-(-2 * 1437 // 479), batch_size=479):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            both.setdefault(int(index), []).append(image)
    differ = [not np.array_equal(*pair) for pair in both.values()]
    assert len(both) == 1437 and np.mean(differ) > 0.8


def test_a_source_serves_only_what_it_was_opened_for(data_dir):
    source = pipeline.open_split(Images(dir=data_dir), "train", train=True)
    with pytest.raises(ValueError, match="train=True"):
        next(loader.eval_batches(source, batch_size=4))


# ------------------------------------------------------------------------ images of many sizes


@pytest.fixture(scope="module")
def photos():
    """JPEGs of different sizes; red above, green below, more of it the higher the label."""
    made = []
    for i in range(12):
        image = np.zeros((40 + 3 * i, 90 - 4 * i, 3), np.uint8)
        image[: len(image) // 2, :, 2] = image[len(image) // 2 :, :, 1] = 100 + 10 * i
        made.append((cv2.imencode(".jpg", image)[1].tobytes(), i % 10))
    return made


def test_photos_of_any_size(tmp_path, make_tfds, photos):
    make_tfds(tmp_path, "photos", photos, channels=3)
    options = Images(
        name="photos", dir=str(tmp_path), image_size=(24, 32), crop="resized", flip=True
    )
    whole = train(options, batch_size=6)
    assert whole[0]["image"].shape == (6, 24, 32, 3)
    same(whole, train(options.model_copy(update={"in_memory": True}), batch_size=6))
    same(whole, train(options, batch_size=6, hosts=2))
    out = evaluate(options, "train", batch_size=5)
    assert out["mask"].sum() == 12 and out["image"].shape == (15, 24, 32, 3)
    red, green, _ = np.moveaxis(out["image"].astype(int), -1, 0)
    assert (red[:, 2] > green[:, 2] + 50).all() and (green[:, -3] > red[:, -3] + 50).all()


def test_undecodable_images(tmp_path, make_tfds, photos, caplog):
    damaged = list(photos)
    damaged[4] = (photos[4][0][:-20], 4)  # cut short
    damaged[7] = (photos[7][0], -1)  # no label
    make_tfds(tmp_path, "photos", damaged, channels=3)
    options = Images(
        name="photos", dir=str(tmp_path), image_size=(8, 8), crop="resized", **EVERYTHING
    )
    with pytest.raises(
        BadRecord, match=r"record \d+ of photos/1.0.0 train \(record \d+ of .*photos-train"
    ):
        train(options, batch_size=12)
    with pytest.raises(BadRecord, match="max_bad_records"):
        train(options.model_copy(update={"max_bad_records": 1}), batch_size=12)
    for in_memory in (True, False):
        update = {"max_bad_records": 2, "in_memory": in_memory}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = train(options.model_copy(update=update), batch_size=12, steps=3)
        assert len(caplog.records) == 2  # each once, though it came up in every epoch
        assert "cut short" in caplog.text and "label is -1" in caplog.text
        for batch in batches:
            bad = batch["mask"] == 0
            assert bad.sum() == 2 and not batch["image"][bad].any()
            assert sorted(batch["index"].tolist()) == list(range(12))  # nothing moved


# ----------------------------------------------------------------------------- damaged files


@pytest.fixture
def copy(data_dir, tmp_path):
    target = tmp_path / "digits"
    shutil.copytree(f"{data_dir}/digits", target)
    return target / "1.0.0" / "digits-test.array_record-00000-of-00001"


def test_a_damaged_record_is_named_or_skipped(data_dir, copy, tmp_path):
    data = bytearray(copy.read_bytes())
    place = data.index(b"IHDR")
    data[place + 20] ^= 1
    copy.write_bytes(data)
    with pytest.raises(BadRecord, match=f"record .* of {copy}.*hash mismatch"):
        evaluate(Images(dir=str(tmp_path)))
    clean = evaluate(Images(dir=data_dir))
    for in_memory in (True, False):
        out = evaluate(Images(dir=str(tmp_path), max_bad_records=1, in_memory=in_memory))
        lost = (out["mask"] != clean["mask"]).nonzero()[0]
        assert len(lost) == 1 and not out["image"][lost].any()
        for key in ("image", "label"):
            np.testing.assert_array_equal(
                np.delete(out[key], lost, 0), np.delete(clean[key], lost, 0)
            )


@pytest.mark.parametrize("size", ["half", "a byte less", "empty", "missing"])
def test_a_file_cut_short_is_named(copy, tmp_path, size):
    data = copy.read_bytes()
    if size == "missing":
        copy.unlink()
    else:
        copy.write_bytes(data[: {"half": len(data) // 2, "empty": 0}.get(size, -1)])
    with pytest.raises(ValueError, match=rf"{copy}"):
        pipeline.open_split(Images(dir=str(tmp_path)), "test", train=False)


# -------------------------------------------------------------------------------- what is asked


def test_embedded_digits_prepare_themselves(tmp_path):
    source = pipeline.open_split(Images(dir=str(tmp_path)), "test", train=False)
    assert len(source) == 360


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "imagenette/160px"])
def test_a_missing_set_says_where_it_looked_and_what_to_run(tmp_path, name):
    with pytest.raises(ValueError, match="localglobal prepare") as error:
        pipeline.open_split(Images(name=name, dir=str(tmp_path)), "train", train=True)
    assert f"looked in {tmp_path}/{name.partition('/')[0]}" in str(error.value)
    assert f"`localglobal prepare {name} --dir {tmp_path}`" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_pointed_at(tmp_path):
    old = tmp_path / "cifar10/3.0.1"
    old.mkdir(parents=True)
    (old / "dataset_info.json").touch()
    with pytest.raises(ValueError, match=r'there is "cifar10:3\.0\.1"'):
        pipeline.open_split(Images(name="cifar10", dir=str(tmp_path)), "train", train=True)


@pytest.mark.parametrize(
    ("kwargs", "split", "message"),
    [
        (dict(name="fashion_mnits"), "train", "did you mean fashion_mnist"),
        (dict(name="digit"), "train", "did you mean digits"),
        (dict(name="fashion_mnist:9.9.9"), "train", "only: 3.0.1"),
        (dict(name="no such name"), "train", "no such name"),
        (dict(), "trian", r"has \['train', 'test'\]. Did you mean train"),
        (dict(), "train[:x]", "train"),
        (dict(mean=(0.5, 0.5, 0.5)), "train", "3 values.* 1 channel"),
    ],
)
def test_what_does_not_exist_is_refused(data_dir, kwargs, split, message):
    with pytest.raises(ValueError, match=message):
        pipeline.open_split(Images(dir=data_dir, **kwargs), split, train=True)


def test_a_part_of_a_split(data_dir):
    whole, part = (evaluate(Images(dir=data_dir), s) for s in ("test", "test[100:150]"))
    assert part["mask"].sum() == 50
    np.testing.assert_array_equal(part["image"], whole["image"][100:150])


def test_texts_are_no_images(tmp_path, monkeypatch):
    options = Images(name="ag_news_subset", dir=str(tmp_path), mock=True)
    with pytest.raises(ValueError, match="ag_news_subset"):
        pipeline.open_split(options, "train", train=True)


# ----------------------------------------------------------------------------------- mock data


def test_mock_needs_no_data(tmp_path):
    options = Images(
        name="imagenet2012", dir=str(tmp_path), mock=True, image_size=(16, 24), crop="resized"
    )
    whole = train(options)
    assert whole[0]["image"].shape == (24, 16, 24, 3) and whole[0]["label"].max() < 1000
    same(whole, train(options, hosts=2))
    assert evaluate(options, "validation")["mask"].sum() == 256
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "classes", "kwargs"),
    [
        ("cifar10", 10, dict(image_size=(32, 32), crop="pad", pad=4)),
        ("cifar10", 10, dict(image_size=(32, 32), in_memory=False)),
        ("imagenet2012", 1000, dict(image_size=(20, 30), crop="resized")),
        ("imagenet2012", 1000, dict(image_size=(20, 30), crop="resized", in_memory=True)),
    ],
)
def test_standard_sets_through_the_normal_path(tmp_path, name, classes, kwargs):
    options = Images(name=name, dir=str(tmp_path), **kwargs, **EVERYTHING)
    with tfds.testing.mock_data(num_examples=50, policy=tfds.testing.MockPolicy.USE_CODE):
        batches = train(options, batch_size=20)
        out = evaluate(options, "test" if name == "cifar10" else "validation", batch_size=20)
        source = pipeline.open_split(options, "train", train=True)
    assert (source.classes, source.channels, len(source)) == (classes, 3, 50)
    assert batches[0]["image"].shape == (20, *options.image_size, 3)
    assert all(b["label"].min() >= 0 and b["label"].max() < classes for b in batches)
    assert out["mask"].sum() == 50
