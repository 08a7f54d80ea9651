# SPDX-License-Identifier: Apache-2.0
"""Pictures in, classes out: of a tiny model, trained by the command line on pictures in which a
coloured patch decides; and where it looked."""

import io
import os
import pathlib
import sys

import cv2
import numpy as np
import pytest

from localglobal_jax import classify, evaluate
from localglobal_jax.cli import main
from localglobal_jax.data import folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
COLOURS = {"blue": (40, 40, 255), "green": (40, 255, 40), "red": (255, 40, 40)}
SIDE, PATCH = 48, 16
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    return ConfigDict(dict(
        steps=60, batch_size=32,
        model=dict(name="coatnet", layout="CC", depths=(1, 1), widths=(16, 32), stem=(8, 16)),
        data=dict(name="folder", image_size=(48, 48), eval_splits=("test",)),
        optim=dict(learning_rate=4e-3, warmup_steps=5, ema=0.9),
        eval=dict(every=0), checkpoint=dict(every=0), log=dict(tensorboard=False),
    ))
"""


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture[..., ::-1])


def patched(colour, at, rng):
    """Grey noise and the patch."""
    picture = rng.integers(60, 200, (SIDE, SIDE, 1), np.uint8).repeat(3, 2)
    picture[at[0] : at[0] + PATCH, at[1] : at[1] + PATCH] = COLOURS[colour]
    return picture


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """PICTURES/red/3_5_7.png has its patch at 5, 7."""
    rng = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("classify")
    for i in range(50):
        for colour in COLOURS:
            y, x = rng.integers(0, SIDE - PATCH + 1, 2)
            file = directory / "PICTURES" / colour / f"{i}_{y}_{x}.png"
            write(file, patched(colour, (y, x), rng))
    return directory


@pytest.fixture(scope="module")
def workdir(root):
    (root / "config.py").write_text(CONFIG)
    given = ["--config", str(root / "config.py"), f"--config.data.dir={root / 'PICTURES'}"]
    assert main(["train", *given, f"--workdir={root / 'run'}"]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def classifier(workdir):
    return classify.load(workdir)


@pytest.fixture
def run(workdir, capsys, monkeypatch):
    """(*options) -> (exit code, stdout, stderr)."""

    def run(*options):
        out = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdout", out)
        code = main(["classify", f"--workdir={workdir}", *map(str, options)])
        out.flush()
        return code, out.buffer.getvalue().decode(), capsys.readouterr().err

    return run


def test_as_good_as_evaluation_says(root, workdir, classifier):
    _, results = evaluate.evaluate(workdir)
    pictures = folder.pictures(str(root / "PICTURES"), "test")
    found = list(classifier.classify([p.path for p in pictures], batch_size=4))
    right = [answer.best[0].label == p.label for answer, p in zip(found, pictures, strict=True)]
    assert len(right) % 4 and np.mean(right) == results["test"]["accuracy"] > 0.8
    loss = [-np.log(next(g.probability for g in a.best if g.label == p.label))
            for a, p in zip(found, pictures, strict=True)]  # fmt: skip
    np.testing.assert_allclose(np.mean(loss), results["test"]["loss"], rtol=1e-4)


def test_the_names_are_those_of_the_folders(root, classifier):
    """Without the data set, from the checkpoint."""
    (answer,) = classifier.classify([root / "PICTURES" / "red" / _one(root, "red")], top=9)
    assert {g.name: g.label for g in answer.best} == {"blue": 0, "green": 1, "red": 2}
    assert answer.best[0].name == "red"
    assert sum(g.probability for g in answer.best) == pytest.approx(1)


def _one(root, colour):
    return sorted(os.listdir(root / "PICTURES" / colour))[0]


def test_the_answer_does_not_depend_on_the_batch(root, classifier):
    paths = sorted((root / "PICTURES").rglob("*.png"))[40:51]
    alone = [next(classifier.classify([path])).best for path in paths]
    together = [answer.best for answer in classifier.classify(paths, batch_size=8)]
    for a, b in zip(alone, together, strict=True):
        assert [g.label for g in a] == [g.label for g in b]
        np.testing.assert_allclose([g.probability for g in a], [g.probability for g in b], 1e-4)
    assert list(classifier.classify([])) == []


def test_it_looked_at_the_patch(root, classifier):
    """The brightest spot of the overlay is in the patch or in a cell (8 pixels) around it."""
    hits = []
    paths = sorted((root / "PICTURES").rglob("*.png"))
    for answer in classifier.classify(paths[::3], overlay=True):
        drawn = cv2.resize(answer.overlay, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(int)
        colour = np.abs(drawn - drawn.mean(2, keepdims=True)).sum(2)
        at = np.array(np.unravel_index(colour.argmax(), colour.shape))
        y, x = map(int, pathlib.Path(answer.path).stem.split("_")[1:])
        hits.append(bool((at >= (y - 8, x - 8)).all() and (at < (y + 24, x + 24)).all()))
    assert np.mean(hits) > 0.8  # by chance, at most 0.44
