# SPDX-License-Identifier: Apache-2.0
"""A run goes on only over its own training records; a change is named."""

import shutil

import cv2
import numpy as np
import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data import identity
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.images.folder_reader import FolderReader

CONFIG = "configs/finetune_folder.py:size=tiny"


def picture(path, number, shape=(8, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(number).integers(0, 255, shape, np.uint8)
    path.write_bytes(cv2.imencode(".bmp", image)[1].tobytes())  # all of one size


@pytest.fixture
def root(tmp_path):
    for i in range(20):
        picture(tmp_path / "mine" / "train" / ("cat", "dog")[i % 2] / f"{i:02}.bmp", i)
    for name in ("cat", "dog"):
        picture(tmp_path / "mine" / "val" / name / "x.bmp", len(name))
    return tmp_path / "mine"


def order(directory, **options):
    given = Images(name="folder", dir=str(directory), image_size=(8, 8), **options)
    return pipeline.open_split(given, "train", train=True).order


CHANGES = {
    "rename": lambda root: (root / "train/cat/00.bmp").rename(root / "train/cat/zz.bmp"),
    "replace": lambda root: picture(root / "train/cat/00.bmp", 99),
    "add": lambda root: picture(root / "train/cat/zz.bmp", 99),
    "remove": lambda root: (root / "train/cat/00.bmp").unlink(),
    "relabel": lambda root: (root / "train/cat/00.bmp").rename(root / "train/dog/00.bmp"),
    "swap": lambda root: (
        picture(root / "train/cat/00.bmp", 1),
        picture(root / "train/dog/01.bmp", 0),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_training_pictures(root, tmp_path, change):
    before, names = order(root), FolderReader(str(root), "train").identities
    assert before.startswith("20 images, ")
    identity.write(tmp_path, before, names)
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    (moved / "val").rename(moved / "validation")
    (moved / "notes.txt").write_text("")
    assert order(moved) == before  # the place does not matter, nor what is not trained on
    CHANGES[change](root)
    after = order(root)
    assert not identity.same(before, after)
    assert identity.same("20 images", after) == (after.startswith("20 images"))  # an old checkpoint
    found = identity.changes(tmp_path, before, FolderReader(str(root), "train").identities)
    assert ("cat/00.bmp" in found) == (change != "add")
    assert ("cat/zz.bmp" in found) == (change in ("rename", "add"))
    assert identity.changes(tmp_path, after, []) == ""  # the file is of another checkpoint


def test_parts_that_one_side_lacks_are_not_compared():
    assert identity.same("3 images", "3 images, names 1, edges 2")
    assert identity.same("3 images, names 1, crc32c 9", "3 images, names 1, edges 2")
    assert not identity.same("3 images, names 1, edges 9", "3 images, names 1, edges 2")
    assert not identity.same("3 images", "4 images, names 1")
    assert identity.same("9 pairs of lengths 1 and words 2", "9 pairs of lengths 1 and words 2")
    assert not identity.same("9 pairs of lengths 1 and words 2", "9 pairs of lengths 1 and words 3")


def test_a_damaged_list_of_records_is_as_none(tmp_path):
    for data in (b"", b"\x1f\x8b", b"{}"):
        (tmp_path / identity.FILE).write_bytes(data)
        assert identity.changes(tmp_path, "", []) == ""


def test_records_of_a_prepared_set():
    """The records, not the number of them: another part of the digits of the same size differs."""

    def of(split):
        return pipeline.open_split(Images(name="digits"), split, train=True).order

    assert of("train[:50]") == of("train[:50]")
    assert not identity.same(of("train[:50]"), of("train[50:100]"))
    mock = pipeline.open_split(Images(name="digits", mock=True), "train", train=True)
    assert mock.order == f"{len(mock)} images"


@pytest.mark.slow
def test_resuming_names_the_change_and_goes_on_when_told_to(root, tmp_path, capsys):
    workdir = tmp_path / "run"

    def train(*more):
        given = [f"--config.data.dir={root}", "--config.steps=2", *more]
        small = ["--config.data.image_size=(32, 32)", "--config.batch_size=4"]
        every = ["--config.checkpoint.every=1", "--config.eval.every=0"]
        command = ["train", "--config", CONFIG, *given, *small, *every]
        return main([*command, "--workdir", str(workdir)])

    assert train() == 0
    shutil.rmtree(workdir / "checkpoints" / "2")  # as if it had been stopped after one step
    CHANGES["rename"](root)
    capsys.readouterr()
    assert train() == 2
    said = capsys.readouterr().err
    assert "cat/zz.bmp" in said and "cat/00.bmp" in said and "data.accept_changes" in said
    assert train("--config.data.accept_changes=True") == 0
    said = capsys.readouterr().err
    assert "cat/zz.bmp" in said and "resumed at step 1" in said
    assert train() == 0  # from then on these are its records
