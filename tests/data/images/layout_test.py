# SPDX-License-Identifier: Apache-2.0
"""Layouts of folders as people have them: each works, or the error has counts and the option."""

import pytest

from localglobal_jax.data.images import layout, scan


def tree(*names, left_out=(), folders=()):
    """A folder of pictures with these names; "cat/*3" stands for three."""
    pictures = [
        f"{name.partition('*')[0]}{i}.jpg"
        for name in names
        for i in range(int(name.partition("*")[2] or 1))
    ]
    return layout.tree(scan.Scan(pictures, list(folders), list(left_out), {}))


def choose(*names, kind="auto", **more):
    return layout.choose(tree(*names, **more), kind, "P")


PAIR = ("cat/", "dog/")


def below(*splits, classes=PAIR):
    return [f"{split}/{name}" for split in splits for name in classes]


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("train", "validation"), ("train", "validation")),
        (("train", "val"), ("train", "validation")),
        (("train", "valid", "test"), ("train", "validation", "test")),
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "Val"), ("train", "validation")),
        (("training", "validation"), ("train", "validation")),
        (("train", "dev"), ("train", "validation")),
        (("seg_train", "seg_test"), ("train", "test")),
        (("asl-alphabet-train", "asl-alphabet-test"), ("train", "test")),
        (("archive/train", "archive/valid"), ("train", "validation")),
        (("seg_train/seg_train", "seg_test/seg_test"), ("train", "test")),
        (("training/training", "validation/validation"), ("train", "validation")),
    ],
)
def test_folders_of_splits(folders, found):
    chosen = choose(*below(*folders))
    assert chosen.splits == dict(zip(found, folders, strict=True))
    assert chosen.names == ("cat", "dog")


@pytest.mark.parametrize(
    "names",
    [
        ("train/", "bus/", "car/"),
        ("train/", "train/old/", "bus/", "car/"),
        ("test/", "bus/", "car/"),
        ("train station/", "test tube/"),
        ("validation/a/", "bus/", "car/"),
    ],
)
def test_classes_that_are_called_like_splits(names):
    chosen = choose(*names)
    assert not chosen.splits
    assert chosen.names == tuple(sorted({name.split("/")[0] for name in names}))


def test_a_folder_train_that_could_be_either_needs_the_option():
    names = ("train/old/*3", "train/new/*2", "bus/*7", "car/*8")
    with pytest.raises(ValueError, match=r"bus 7, car 8, train 5.*data\.layout=classes"):
        choose(*names)
    assert choose(*names, kind="classes").names == ("bus", "car", "train")
    assert choose(*names, kind="splits").splits == {"train": "train"}


def test_pictures_to_predict_beside_the_splits_are_no_split():
    chosen = choose(*below("train", "val"), "to predict/*9", "test/*5")
    assert chosen.splits == {"train": "train", "validation": "val", "test": "test"}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        ((), "0 pictures in no folder"),
        (("*7",), "7 pictures in no folder"),
        (("train/*5", "test/*3"), "5 pictures in no folder"),
        (("cat/*4",), "cat 4"),
        (("PetImages/Cat/*4", "PetImages/Dog/*5"), r"Cat 4, Dog 5.*data\.dir='P/PetImages'"),
        (("train/cat/*4", "val/cat/"), "cat 4"),
    ],
)
def test_too_few_classes_are_counted(names, counts):
    with pytest.raises(ValueError, match=counts):
        choose(*names)


def test_labels_in_a_table_are_named():
    with pytest.raises(ValueError, match=r"P/train .*4 pictures"):
        choose("train/*4", left_out=[(scan.OTHER, "labels.csv")])
    with pytest.raises(ValueError, match=r"labels\.csv"):
        choose("*4", left_out=[(scan.OTHER, "labels.csv")])


def test_two_folders_of_one_split():
    with pytest.raises(ValueError, match="val, valid"):
        choose(*below("train", "val", "valid"))


@pytest.mark.parametrize("kind", ["auto", "classes"])
def test_folders_without_pictures(kind):
    """An empty folder is a class; one of annotations is not, nor one of workdirs."""
    left_out = [
        (scan.OTHER, "annotations/1.xml"),
        (scan.RUN, "mine/first"),
        (scan.RUN, "single"),
        (scan.KIND, "fox/1.heic"),
        (scan.HIDDEN, "gnu/.gitkeep"),
    ]
    found = choose(
        *PAIR, left_out=left_out, folders=["eel", "gnu", "fox", "mine", "runs", "val"], kind=kind
    )
    classes = {"cat", "dog", "eel", "fox", "gnu"}
    others = {"annotations", "runs", "val"}
    assert set(found.names) == classes | (others if kind == "classes" else set())


def test_folders_of_workdirs_and_overlays_are_no_classes():
    runs = [(scan.RUN, "mine/first"), (scan.OVERLAY, "mine/seen/1.jpg.png")]
    assert choose(*PAIR, left_out=runs).names == ("cat", "dog")
    assert choose(*PAIR, "mine/a/", left_out=runs).names == ("cat", "dog", "mine")
    assert choose(*PAIR, left_out=[(scan.RUN, "cat/first")]).names == ("cat", "dog")


def test_layout_splits_without_train_is_counted():
    with pytest.raises(ValueError, match=r"data\.layout=splits.*cat 1, dog 1"):
        choose(*PAIR, kind="splits")
    assert choose(*below("a/train"), kind="splits").splits == {"train": "a/train"}


def test_names_that_differ_in_form_only():
    assert choose("cafe\u0301/", "dog/").labels == ["caf\u00e9", "dog"]
    with pytest.raises(ValueError, match=r"caf\\xe9"):
        choose("caf\u00e9/", "cafe\u0301/")


def test_the_natural_order_of_numbers():
    names = ["0", "1", "10", "2", "a10", "a9"]
    assert sorted(names, key=layout.natural) == ["a9", "a10", "0", "1", "2", "10"]
