# SPDX-License-Identifier: Apache-2.0
"""Classifies images with a tiny model, trained by the command line on images whose class is the
colour of a patch; Grad-CAM finds the patch."""

import io
import json
import os
import pathlib
import sys

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import localglobal_jax as lg
from localglobal_jax.checkpoints import manager
from localglobal_jax.cli.main import main
from localglobal_jax.config import schema
from localglobal_jax.convert import files, weights
from localglobal_jax.data.images import folder
from localglobal_jax.inference import load as inference_load
from localglobal_jax.inference.classifier import load, of_checkpoint
from localglobal_jax.models import registry
from localglobal_jax.training import evaluation

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
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
    return load(workdir)


@pytest.fixture
def run(workdir, capsys, monkeypatch):
    """(*options) -> (exit code, stdout, stderr)."""

    def run(*options):
        out = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdout", out)
        code = main(["classify", f"--workdir={workdir}", *map(str, options)])
        out.flush()
        return code, out.buffer.getvalue().decode(errors="surrogateescape"), capsys.readouterr().err

    return run


# ---------------------------------------------------------------------------- the library


def test_as_good_as_evaluation_says(root, workdir, classifier):
    _, results = evaluation.evaluate(workdir)
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


def test_classes_that_have_changed_are_refused(root, workdir, capsys):
    """A renamed folder would shift the numbers of the classes in silence."""
    pictures = root / "PICTURES"
    given = [f"--config={root / 'config.py'}", f"--config.data.dir={pictures}"]
    try:
        (pictures / "red").rename(pictures / "a_red")
        assert main(["train", *given, f"--workdir={workdir}"]) == 2
        said = capsys.readouterr().err
        assert "the data has the classes a_red, blue, green" in said
        assert "trained on blue, green, red" in said
        assert main(["evaluate", f"--workdir={workdir}"]) == 2
        assert "trained on blue, green, red" in capsys.readouterr().err
    finally:
        (pictures / "a_red").rename(pictures / "red")


def test_converted_weights_say_what_is_missing(tmp_path):
    golden = json.loads((GOLDEN / "coatnet_0_rw.json").read_text())
    state = weights.read_safetensors(GOLDEN / "coatnet_0_rw.safetensors")
    module, variables = lg.convert.timm.load(golden["cfg"], state, **golden["model_kwargs"])
    saved = manager.Checkpoints(tmp_path / "checkpoints", schema.Checkpoints())
    saved.save(0, {"variables": variables}, metadata={"model": registry.describe(module)})
    saved.close()
    with pytest.raises(ValueError, match=r"--config.data.image_size, .*.mean, .*.std"):
        load(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write(tmp_path / "noise.png", noise)
    given = {"data.image_size": "(64, 64)", "data.mean": "(0.5,)", "data.std": "(0.25,)"}
    classifier = load(tmp_path, overrides=given)
    (answer,) = classifier.classify([tmp_path / "noise.png"], top=99)
    logits, _ = jax.jit(module.apply)(variables, (noise[None] / 255 - 0.5) / 0.25)
    expected = jax.nn.softmax(logits[0])
    assert {guess.name: guess.probability for guess in answer.best} == pytest.approx(
        {str(i): float(p) for i, p in enumerate(expected)}, rel=1e-4
    )


# ---------------------------------------------------------------------------- the command


def test_a_line_per_picture(run, root):
    code, out, error = run(root / "PICTURES", "--top=2")
    lines = [line.split("\t") for line in out.splitlines()]
    paths = [line[0] for line in lines]
    assert (code, error, len(lines)) == (0, "", 150)
    assert paths == sorted(paths, key=lambda path: pathlib.Path(path).parts)
    assert {len(line) for line in lines} == {5}
    assert np.mean([f"/{line[1]}/" in line[0] for line in lines]) > 0.8
    assert all(float(line[2]) >= float(line[4]) for line in lines)


def odd(directory):
    """What people's folders hold; the names of the good ones, in their order, and of the bad."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(noise)
    directory.mkdir()
    picture.convert("CMYK").save(directory / "cmyk.jpg")
    picture.convert("P").save(directory / "palette.png")
    picture.convert("RGBA").save(directory / "alpha.png")
    picture.save(directory / "moves.gif", save_all=True, append_images=[picture.rotate(90)])
    Image.fromarray(noise[..., 0].astype(np.uint16) * 256).save(directory / "16_bits.png")
    Image.fromarray(noise[:1]).save(directory / "line.png")
    picture.save(directory / "a\\b\tc\nd.jpg")
    picture.save(os.fsencode(directory) + b"/\xff.jpg")
    whole = (directory / "cmyk.jpg").read_bytes()
    (directory / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (directory / "text.png").write_text("no picture")
    (directory / "nothing.png").touch()
    (directory / "folder.png").mkdir()
    (directory / "gone.jpg").symlink_to("nowhere")
    (directory / "loop").symlink_to("..")
    (directory / ".hidden.png").touch()
    (directory / "list.txt").touch()
    good = ["16_bits.png", r"a\\b\tc\nd.jpg", "alpha.png", "cmyk.jpg", "line.png", "moves.gif"]
    bad = ["cut.jpg", "gone.jpg", "nothing.png", "text.png"]
    return [*good, "palette.png", "\udcff.jpg"], bad


def test_odd_files_are_named_and_the_others_classified(run, tmp_path):
    good, bad = odd(tmp_path / "odd")
    code, out, error = run(tmp_path / "odd", "--batch_size=4", f"--overlay={tmp_path / 'seen'}")
    lines = [line.split("\t") for line in out.split("\n")[:-1]]
    assert code == 2 and {len(line) for line in lines} == {7}
    assert [line[0].rpartition("/")[2] for line in lines] == good
    warning, *said = error.splitlines()
    assert "data.eval_crop" in warning  # the run squashes pictures
    assert all(line.startswith("localglobal classify: ") for line in said)
    assert [line.split(": ")[1].rpartition("/")[2] for line in said] == bad
    seen = [path for path in (tmp_path / "seen").rglob("*") if path.is_file()]
    assert len(seen) == len(good)
    assert cv2.imread(str(tmp_path / "seen" / "line.png.png")).shape == (6, 384, 3)


def test_json_says_everything(run, root, tmp_path):
    file = next((root / "PICTURES" / "blue").iterdir())
    (tmp_path / "text.png").write_text("no picture")
    given = [f"file://{file}", tmp_path / "text.png", "http://x.org/a.png", tmp_path]
    code, out, _ = run(*given, "--json", f"--overlay={tmp_path / 'seen'}")
    first, *others = json.loads(out)["images"]
    assert code == 2 and first["path"] == f"file://{file}"
    assert [guess.keys() for guess in first["classes"]] == [{"label", "name", "probability"}] * 3
    assert first["classes"][0]["name"] == "blue"
    assert cv2.imread(first["overlay"]).shape == (384, 384, 3)
    assert [other["path"] for other in others] == [*map(str, given[1:3]), f"{given[1]}"]
    assert "JPEG" in others[0]["problem"] and "file:///PATH" in others[1]["problem"]


def test_overlays_lie_as_the_pictures_do(run, root, tmp_path):
    pictures = root / "PICTURES"
    (name,) = [path.name for path in [next((pictures / "red").iterdir())]]
    (pictures / "blue" / name).write_bytes((pictures / "red" / name).read_bytes())
    given = [pictures / "blue" / name, pictures / "red" / name, f"--overlay={tmp_path / 'seen'}"]
    try:
        assert run(*given)[0] == 0
    finally:
        (pictures / "blue" / name).unlink()
    assert (tmp_path / "seen" / "blue" / f"{name}.png").is_file()
    assert (tmp_path / "seen" / "red" / f"{name}.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["."], ".webp"),
        ([""], "the path is empty"),
        (["file://host/a.png"], "want a local path, file:///PATH"),
        (["a.png", "--top=0"], "top=0"),
        (["a.png", "--step=7"], "no checkpoint of step 7"),
        (["a.png", "--overlay=file"], "--overlay file cannot be made: File exists"),
        (["a.png", "a.png.png", "--overlay=."], "would overwrite the picture a.png.png"),
        (["a.png", "--overlay=seen", "--overlay_stage=3"], "has the stages 1 to 2"),
        (["a.png", "--overlay_stage=1"], "--overlay_stage is for --overlay"),
        (["a.png", "--config.data.image_size=(50, 50)"], "for instance 48x48 or 56x56"),
        (["a.png", "--config.data.image_sise=(50, 50)"], 'did you mean "data.image_size"'),
        (["a.png", "--config.data.mean=(0.5, 0.5)"], "data.mean=(0.5, 0.5) has 2 values"),
        (["a.png", "--config.data.dir=x"], "data.dir"),
    ],
)
def test_wrong_options(run, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, error = run(*options)
    assert (code, out) == (2, "") and message in error
    assert error.count("\n") == 1 and not (tmp_path / "a.png.png").exists()


def test_models_of_text_do_not_classify(run, tmp_path):
    arguments = json.loads((GOLDEN / "muse_simple_post.json").read_text())["args"]
    weights = str(GOLDEN / "muse_simple_post.safetensors")
    files.convert_file("fairseq", weights, str(tmp_path), arguments=arguments)
    code, _, error = run("a.png", f"--workdir={tmp_path}")
    assert code == 2 and "this EncoderDecoder does not classify images" in error


def test_images_are_not_translated(workdir, capsys):
    assert main(["translate", f"--workdir={workdir}"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_probabilities_are_those_of_the_loss(loss, workdir, root):
    _, variables, metadata = inference_load.read_variables(workdir)
    metadata["config"]["task"]["loss"] = loss
    classifier = of_checkpoint(workdir, variables, metadata)
    picture = next((root / "PICTURES" / "red").iterdir())
    (answer,) = classifier.classify([picture], top=3)
    total = sum(guess.probability for guess in answer.best)
    assert (abs(total - 1) < 1e-5) == (loss == "softmax")
