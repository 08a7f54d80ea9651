# SPDX-License-Identifier: Apache-2.0
"""Pictures of one's own: what a folder holds, how it is split, what is wrong with its files."""

import json

import cv2
import numpy as np
import pytest
import small

from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import folder, folder_count, pipeline
from localglobal_jax.data.images.folder_reader import FolderReader

CONFIG = "configs/finetune_folder.py:size=tiny"


def write(path, shade=0, shape=(20, 30)):
    """Writes a picture; no two names have the same bytes, as copies are counted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((*shape, 3), shade, np.uint8)
    image[:2] = np.random.default_rng([*str(path).encode()]).integers(0, 255, (2, shape[1], 3))
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


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


def test_what_is_no_picture_is_left_out_and_counted(root, caplog):
    before = folder_count.count(str(root))
    assert not any("left out" in key for key in before)
    (root / "cat" / "list.txt").write_text("0.jpg")
    (root / "cat" / "0.HEIC").write_text("0.jpg")
    (root / "cat" / ".DS_Store").write_text("")
    write(root / "stray.png")
    after = folder_count.count(str(root))
    assert {key: n for key, n in after.items() if key not in before} == {
        **{"left out, not pictures": 1, "left out, not pictures/cat": 1},
        **{"left out, pictures of another kind": 1, "left out, pictures of another kind/cat": 1},
        **{"left out, hidden or of the system": 1, "left out, hidden or of the system/cat": 1},
        "left out, pictures in no folder of a class": 1,
    }
    said = "\n".join(caplog.messages)
    assert all(name in said for name in ("list.txt", ".txt 1", ".heic 1", ".DS_Store", "stray.png"))


def test_exact_copies_are_counted(root, caplog):
    assert "copies" not in folder_count.count(str(root))
    found = {split: folder.pictures(str(root), split) for split in folder.SPLITS}
    data = found["train"][0].path.read_bytes()
    for split in ("train", "validation"):
        for picture in (p for p in found[split][1:] if p.label == 0):
            picture.path.write_bytes(data)
            break
    (root / "dog" / "more" / "0.png").write_bytes(data)
    counts = folder_count.count(str(root))
    assert counts["copies"] == 3
    assert counts["copies in two splits"] == counts["copies in two classes"] == 3
    assert "dog/more/0.png" in caplog.text


def test_imbalance_is_said(root, caplog):
    for i in range(2, 40):
        (root / "cat" / f"{i}.jpg").unlink()
    folder_count.count(str(root))
    assert "unbalanced" in caplog.text


def test_the_order_of_numbered_classes_is_said(tmp_path, caplog):
    for i in range(11):
        write(tmp_path / str(i) / "a.png")
    assert folder.classes(str(tmp_path))[:3] == ["0", "1", "10"]
    FolderReader(str(tmp_path), "train").announce()
    assert "0, 1, 10, 2" in caplog.text


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
    assert folder_count.count(str(tmp_path)) == {
        **{"train": 2, "train/a": 1, "train/b": 1},
        **{"validation": 1, "validation/a": 1, "validation/b": 0},
        **{"left out, hidden or of the system": 1, "left out, hidden or of the system/a": 1},
    }
    with pytest.raises(
        ValueError, match=rf"split test.*eval_splits.*validation.*data\.dir='{tmp_path}/train'"
    ):
        folder.pictures(str(tmp_path), "test")
    write(tmp_path / second / "c" / "4.png")
    with pytest.raises(ValueError, match=r"c 1 .*a, b"):
        folder.pictures(str(tmp_path), "validation")


def test_a_flat_folder_of_a_split(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "test/3.png", "test/4.png"):
        write(tmp_path / name)
    counts = folder_count.count(str(tmp_path))
    assert counts["train"] == 2 and "test" not in counts
    assert counts["left out, pictures in no folder of a class"] == 2
    with pytest.raises(ValueError, match=r"test has 2.*data\.dir="):
        folder.pictures(str(tmp_path), "test")


def test_classes_of_splits_in_two_unicode_forms(tmp_path):
    for name in ("train/caf\u00e9/1.png", "train/b/2.png", "val/cafe\u0301/3.png"):
        write(tmp_path / name)
    (picture,) = folder.pictures(str(tmp_path), "validation")
    assert folder.classes(str(tmp_path))[picture.label] == "caf\u00e9"


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
    assert "data.max_bad_records" in said


def test_prepare_needs_the_splits_of_the_run_alone(tmp_path, capsys):
    names = [f"{c}/{n}.png" for n in range(30) for c in ("cat", "dog")]
    names = [name for name in names if folder.split_of(name) != "test"]
    for name in names:
        write(tmp_path / name)
    command = ["prepare", "--config", CONFIG, f"--config.data.dir={tmp_path}", "--json"]
    splits = {"train", "validation"}
    assert {folder.split_of(name) for name in names} == splits
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out).keys() & {*folder.SPLITS} == splits
    assert main([*command, "--config.data.eval_splits=test"]) == 2
    assert "split test" in capsys.readouterr().err


def test_a_bad_picture_is_named_or_tolerated(root):
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    options = Images(name="folder", dir=str(root), image_size=(16, 16))
    with pytest.raises(ValueError, match=r"cat/\d+.jpg: .*data.max_bad_records"):
        pipeline.open_split(options, "train", train=True)
    tolerant = options.model_copy(update={"max_bad_records": 40})
    assert len(pipeline.open_split(tolerant, "train", train=True).bad) > 20


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


@pytest.mark.slow  # in the suite a run trains on such a folder in wild_folder_test.py
def test_it_trains(root, tmp_path, capsys):
    workdir = tmp_path / "run"
    given = ["--config", CONFIG, f"--config.data.dir={root}", "--config.steps=2"]
    given += ["--config.data.image_size=(32, 32)", "--config.eval.every=0"]
    given += [f"--config.{field}={value}" for field, value in small.IMAGES.items()]
    given += ["--config.model.widths=(32,)"]  # a head
    assert main(["train", *given, "--workdir", str(workdir)]) == 0
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "validation" and 0 <= last["accuracy"] <= 1


@pytest.mark.parametrize("asked", ["validation", "val"])
def test_a_split_that_a_run_evaluates_has_to_be_there(asked, tmp_path):
    for name in ("cat", "dog"):
        for i in range(2):
            write(tmp_path / "train" / name / f"{i}.png")
    with pytest.raises(ValueError, match=asked):
        folder_count.count(str(tmp_path), needed={"train", asked})
    assert folder_count.count(str(tmp_path), needed={"train"})["train"] == 4
