# SPDX-License-Identifier: Apache-2.0
"""Pictures of one's own: what a folder holds, how it is split, what is wrong with its files."""

import json

import cv2
import numpy as np
import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import folder, pipeline

CONFIG = "configs/finetune_folder.py:size=tiny"


def write(path, shade=0, shape=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*shape, 3), shade, np.uint8))


@pytest.fixture
def root(tmp_path):
    """Forty dark cats, forty bright dogs, of all sizes."""
    for i in range(40):
        write(tmp_path / "mine" / "cat" / f"{i}.jpg", 20, (20 + i, 30))
        write(tmp_path / "mine" / "dog" / "more" / f"{i}.png", 220)
    return tmp_path / "mine"


def test_every_picture_is_in_one_split_and_stays_there(root):
    before = {split: folder.pictures(str(root), split) for split in folder.SPLITS}
    paths = [picture.path for found in before.values() for picture in found]
    assert len(paths) == len(set(paths)) == 80
    assert len(before["train"]) > 50
    write(root / "cat" / "another.jpeg")
    for split, found in before.items():
        assert set(found) <= set(folder.pictures(str(root), split))


def test_what_is_no_picture_is_left_out_and_named(root, caplog):
    before = folder.count(str(root))
    (root / "cat" / "list.txt").write_text("0.jpg")
    (root / "cat" / ".DS_Store").write_text("")
    write(root / "stray.png")
    assert folder.count(str(root)) == before
    (line,) = caplog.messages  # not for each split
    assert "2, such as" in line and "list.txt" in line and "stray.png" in line


def test_a_class_without_pictures_is_named(root, caplog):
    (root / "eel").mkdir()
    assert folder.count(str(root))["train/eel"] == 0
    assert "no picture to train on of eel" in caplog.text


def test_labels_are_the_places_of_the_sorted_names(root):
    options = Images(name="folder", dir=str(root), image_size=(16, 16))
    assert pipeline.describe(options) == (2, 3)
    source = pipeline.open_split(options, "validation", train=False)
    for batch in loader.eval_batches(source, batch_size=4):
        real = batch["mask"] > 0
        bright = batch["image"][real].mean((1, 2, 3)) > 128
        np.testing.assert_array_equal(batch["label"][real], bright)


@pytest.mark.parametrize("second", ["validation", "val"])
def test_splits_that_are_folders(tmp_path, second):
    for name in ("train/a/1.png", "train/b/2.png", f"{second}/a/3.png"):
        write(tmp_path / name)
    write(tmp_path / "train/a/.hidden.png")
    assert folder.count(str(tmp_path)) == {
        **{"train": 2, "train/a": 1, "train/b": 1},
        **{"validation": 1, "validation/a": 1, "validation/b": 0},
    }
    with pytest.raises(ValueError, match="split test"):
        folder.pictures(str(tmp_path), "test")
    write(tmp_path / second / "c" / "4.png")
    with pytest.raises(ValueError, match="a, b"):
        folder.pictures(str(tmp_path), "validation")


def test_prepare_counts_and_names_what_is_damaged(root, capsys):
    command = ["prepare", "--config", CONFIG, f"--config.data.dir={root}"]
    assert main([*command, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert sum(counts[f"{split}/cat"] for split in folder.SPLITS) == 40
    (root / "cat" / "3.jpg").write_bytes((root / "cat" / "3.jpg").read_bytes()[:-10])
    (root / "dog" / "text.png").write_text("no picture")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "2 files are not whole pictures" in said
    assert "3.jpg: the JPEG is cut short" in said and "text.png" in said


def test_a_bad_picture_is_named_or_tolerated(root):
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    options = Images(name="folder", dir=str(root), image_size=(16, 16))
    with pytest.raises(ValueError, match=r"cat/\d+.jpg: .*data.max_bad_records"):
        pipeline.open_split(options, "train", train=True)
    tolerant = options.model_copy(update={"max_bad_records": 40})
    assert pipeline.open_split(tolerant, "train", train=True).skipped > 20


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        (None, "needs data.dir"),
        ("nowhere", "no such folder"),
        ("mine/cat", "has 0 folders of pictures"),
    ],
)
def test_what_is_no_folder_of_classes(root, directory, message):
    given = directory and str(root.parent / directory)
    with pytest.raises(ValueError, match=message):
        pipeline.describe(Images(name="folder", dir=given))


def test_it_trains(root, tmp_path, capsys):
    workdir = tmp_path / "run"
    given = ["--config", CONFIG, f"--config.data.dir={root}", "--config.steps=2"]
    small = ["--config.data.image_size=(32, 32)", "--config.eval.every=0"]
    assert main(["train", *given, *small, "--workdir", str(workdir)]) == 0
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "validation" and 0 <= last["accuracy"] <= 1
