# SPDX-License-Identifier: Apache-2.0
"""Every command on a folder with names in any bytes and a workdir inside it."""

import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import small

from localglobal_jax.checkpoints import workdir as workdirs
from localglobal_jax.cli.main import main
from localglobal_jax.config.schema import Images
from localglobal_jax.data.images import folder

CONFIG = f"{pathlib.Path.cwd()}/configs/finetune_folder.py:size=tiny"
NAMES = [b"caf\xe9.JPG", b"a\nb.Jpeg", b"-rf.png", b" \xf0\x9f\x90\x88.png", b"x" * 251 + b".png"]
CLASSES = [b"cat", b"d\xf6g", b"e\nel"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three classes, with the working directory in it."""
    rng = np.random.default_rng(0)
    for label in CLASSES:
        place = os.path.join(os.fsencode(tmp_path), b"mine", label)
        os.makedirs(place)
        for i in range(20):
            name = NAMES[i] if i < len(NAMES) else b"%d.png" % i
            image = rng.integers(0, 255, (16, 16, 3), np.uint8)
            ending = ".png" if name.endswith(b".png") else ".jpg"
            with open(os.path.join(place, name), "wb") as file:
                file.write(cv2.imencode(ending, image)[1].tobytes())
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def console(*argv, **more):
    """Runs the command in a process of its own, whose streams are strict UTF-8."""
    command = [sys.executable, "-m", "localglobal_jax", *argv]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, **more)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def test_prepare_counts_and_names_what_it_cannot_read(root, capsys):
    broken = os.path.join(os.fsencode(root), CLASSES[1], b"\xff\n.png")
    for path in (os.path.join(os.fsencode(root), CLASSES[2], b"\xfe.txt"), broken):
        with open(path, "wb"):
            pass
    done = console("prepare", "--config", CONFIG, "--config.data.dir=.")
    assert done.returncode == 2
    said = done.stderr.decode()
    assert r"d\xf6g/\xff\n.png: the file is empty" in said and r"\xfe.txt" in said
    os.unlink(broken)
    done = console("prepare", "--config", CONFIG, "--config.data.dir=.")
    assert r"train/e\nel: " in done.stdout.decode()
    assert main(["prepare", "--config", CONFIG, "--config.data.dir=.", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    total = sum(counts[f"{split}/" + r"d\xf6g"] for split in folder.SPLITS)
    assert total == 20


def test_a_run_inside_its_data(root, capfd):
    given = ["--config", CONFIG, "--config.data.dir=.", "--config.steps=2", "--config.eval.every=0"]
    given += ["--config.data.image_size=(32, 32)", "--config.batch_size=8"]
    given += [f"--config.{field}={value}" for field, value in small.IMAGES.items()]
    given += ["--config.model.widths=(32,)"]  # a head
    command = ["train", *given, "--workdir", "runs/mine"]
    assert main(command) == 0
    labels = ["cat", r"d\xf6g", r"e\nel"]
    assert folder.classes(".") == labels
    assert (root / "runs" / "mine" / "learning_curve.png").exists()
    capfd.readouterr()
    assert main(command) == 0  # resumes
    assert "resumed at step 2" in capfd.readouterr().err
    assert main(["evaluate", "--workdir", "runs/mine", "--json"]) == 0
    capfd.readouterr()
    assert main(["classify", "--workdir", "runs/mine", ".", "--overlay", "seen", "--json"]) == 0
    answers = json.loads(capfd.readouterr().out)["images"]
    assert len(answers) == 60  # nothing of the workdir
    assert len([path for path in (root / "seen").rglob("*.png") if path.is_file()]) == 60
    assert folder.classes(".") == labels  # overlays are no pictures of a class
    assert {guess["name"] for guess in answers[0]["classes"]} == set(labels)
    assert main(["report", "runs/mine", "--out", "../report.html"]) == 0
    assert r"e\nel" in (root.parent / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [".", "cat", "link", "again/cat"])
def test_a_workdir_may_not_hold_pictures(root, name):
    (root / "link").symlink_to("cat")
    (root.parent / "again").symlink_to("mine")
    options = Images(name="folder", dir=str(root.parent / "again"))
    given = root.parent / name if name.startswith("again") else name
    with pytest.raises(ValueError, match=r"--workdir"):
        folder.check_workdir(options, given)
    folder.check_workdir(options, "cat/runs/mine")
    folder.check_workdir(options, "..")
    assert not (root / "cat" / "config.json").exists()


def test_the_refusal_comes_before_anything_is_written(root, capsys):
    before = sorted(root.rglob("*"))
    assert main(["train", "--config", CONFIG, "--config.data.dir=.", "--workdir", "cat"]) == 2
    assert "--workdir cat" in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before


def test_labels_in_another_unicode_form_are_the_same():
    workdirs.check_labels(["caf\u00e9"], {"labels": ["cafe\u0301"]})
    with pytest.raises(ValueError, match="caf"):
        workdirs.check_labels(["caf\u00e9"], {"labels": ["cafe"]})
