# SPDX-License-Identifier: Apache-2.0
"""Pictures of phones: turned by their EXIF orientation in training, evaluation and `classify`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import localglobal_jax as lg
from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data import loader
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.images.folder import open_folder
from localglobal_jax.data.images.folder_reader import FolderReader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same upright pictures twice: turned in the file and tagged, and as they are."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(6):
            upright = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 6
            split = "train" if i < 4 else "validation"
            for kind, picture, tags in (
                ("phone", upright.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
                ("upright", upright, {}),
                ("stored", upright.transpose(Image.Transpose.ROTATE_90), {}),
            ):
                path = root / kind / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, **tags)
    return root


def batches(directory, **options):
    given = Images(name="folder", dir=str(directory), image_size=(8, 12), flip=True, **options)
    source = pipeline.open_split(given, "train", train=True)
    train = loader.train_batches(source, batch_size=8, seed=0, start=0, stop=2)
    source = pipeline.open_split(given, "validation", train=False)
    evaluation = loader.eval_batches(source, batch_size=4)
    return [batch["image"] for batch in (*train, *evaluation)]


@pytest.mark.parametrize("crop", ["none", "resized"])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_those_of_upright_pictures(folders, crop, in_memory, channels):
    given = {"crop": crop, "in_memory": in_memory, "channels": channels}
    phone = batches(folders / "phone", **given)
    upright = batches(folders / "upright", **given)
    off = batches(folders / "phone", **given, exif_orientation=False)
    stored = batches(folders / "stored", **given)
    assert phone[0].shape == (8, 8, 12, channels)
    for one, two, three, four in zip(phone, upright, off, stored, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(three, four)
        assert not np.array_equal(one, three)


def test_prepare_says_what_is_turned(folders, folder_config, capsys):
    command = ["prepare", "--config", folder_config, f"--config.data.dir={folders / 'phone'}"]
    for flag, value in ((), True), (("--config.data.exif_orientation=False",), False):
        assert main([*command, *flag]) == 0
        said = capsys.readouterr().err
        assert "EXIF orientation: 12 " in said and f"data.exif_orientation={value}" in said
    assert main([*command[:-1], f"--config.data.dir={folders / 'upright'}"]) == 0
    assert "EXIF" not in capsys.readouterr().err


def test_pictures_turned_in_many_threads_are_all_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", quality=95, exif=exif)
    for name in ("cat", "dog"):
        folder = tmp_path / "p" / "train" / name
        folder.mkdir(parents=True)
        for i in range(150):
            (folder / f"{i}.jpg").hardlink_to(tmp_path / "0.jpg")
    directory = str(tmp_path / "p")
    reader = FolderReader(directory, "train", opened=open_folder(directory))
    assert len(reader.checked()) == reader.turned == 300


@pytest.fixture(scope="module")
def run(folder_config):
    """Runs a command on a workdir and a folder; returns its exit code."""

    def run(command, workdir, folder, *flags):
        given = () if command == "evaluate" else ("--config", folder_config)
        data = f"--config.data.dir={folder}"
        return main([command, *given, data, "--workdir", str(workdir), *flags])

    return run


@pytest.fixture(scope="module")
def phone(folders, run, tmp_path_factory):
    """A run on the tagged pictures."""
    workdir = tmp_path_factory.mktemp("runs") / "phone"
    assert run("train", workdir, folders / "phone") == 0
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [line["loss"] for line in metrics(workdir) if "loss" in line]


def test_training_evaluation_and_classify_agree(folders, run, phone, tmp_path):
    """The run on tagged pictures is the run on upright ones, and so are its answers."""
    assert run("train", tmp_path / "upright", folders / "upright") == 0
    assert losses(phone) == losses(tmp_path / "upright")
    classifier = lg.load_classifier(phone)
    names = [f"validation/{name}/5.png" for name in ("cat", "dog")]

    def answers(kind):
        return [
            found.best
            for found in classifier.classify([folders / kind / name for name in names], top=2)
        ]

    assert answers("phone") == answers("upright") != answers("stored")


def test_a_run_from_before_the_option_goes_on_as_it_began(folders, run, tmp_path, capsys):
    """Its config.json has no such field: pictures stay as stored, and the log says so once."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    off = "--config.data.exif_orientation=False"
    assert run("train", whole, folders / "phone", off, "--config.checkpoint.every=2") == 0
    shutil.copytree(whole, old)
    config = json.loads((old / "config.json").read_text())
    del config["data"]["exif_orientation"]
    (old / "config.json").write_text(json.dumps(config))
    for step in (old / "checkpoints").glob("*"):
        if step.name == "4":  # as if it had ended after step 2
            shutil.rmtree(step)
    capsys.readouterr()
    more = ("--config.checkpoint.every=2",)
    assert run("train", old, folders / "phone", *more) == 0
    assert capsys.readouterr().err.count("data.exif_orientation") == 1
    assert losses(old)[-1] == losses(whole)[-1]
    assert json.loads((old / "config.json").read_text())["data"]["exif_orientation"] is None
    assert run("train", old, folders / "phone", *more) == 0  # and again
    assert run("evaluate", old, folders / "phone") == 0
    classifier = lg.load_classifier(old)
    assert not classifier.options.exif_orientation


def test_another_orientation_is_another_run(folders, run, phone, capsys):
    off = "--config.data.exif_orientation=False"
    assert run("train", phone, folders / "phone", off) == 2
    assert "data.exif_orientation" in capsys.readouterr().err
