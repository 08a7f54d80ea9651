# SPDX-License-Identifier: Apache-2.0
"""Evaluation at another size, on other data and of converted weights; fine-tuning on other classes.

Models are random. The accuracy has to be the share of `classify`'s right answers, by name.
"""

import functools
import json
import logging
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import localglobal_jax as lg
from localglobal_jax.checkpoints import manager
from localglobal_jax.cli.main import main
from localglobal_jax.config import schema
from localglobal_jax.data.text import tokenizers
from localglobal_jax.inference import classifier, load
from localglobal_jax.models import registry

EOS = tokenizers.EOS
ROOT = pathlib.Path(__file__).parents[2]
SPLITS = ("train", "validation")
SIZE, LARGER = (64, 64), (96, 96)
COLOURS = {"blue": (40, 40, 255), "green": (40, 255, 40), "red": (255, 40, 40)}
STAGES = dict(depths=(1, 1), widths=(16, 32), stem=(4, 8))
NARROW = {"head_width": 8}
FAMILIES = {
    "coatnet": ("coatnet", dict(layout="CT", blocks={"T": NARROW}, **STAGES)),
    "coatnet, one block": (  # where the family is not the subject
        "coatnet",
        dict(layout="T", depths=(1,), widths=(16,), stem=(4, 8), blocks={"T": NARROW}),
    ),
    "coatnet, bias by an MLP": (
        "coatnet",
        dict(layout="CT", blocks={"T": {**NARROW, "bias": "mlp"}}, **STAGES),
    ),
    "coatnet, tanh layer": (
        "coatnet",
        dict(layout="CT", blocks={"T": NARROW}, head_hidden=12, **STAGES),
    ),
    "NAM": ("coatnet", dict(layout="NAM", depths=(1, 1, 1), widths=(8, 32, 32), stem=(4, 8))),
    "OFSN": (
        "coatnet",
        dict(layout="OFSN", depths=(1, 1, 1, 1), widths=(32, 32, 32, 32), stem=(4, 8)),
    ),
    "CE": ("coatnet", dict(layout="CE", **STAGES)),
    "volo": (
        "volo",
        dict(layout="OS", depths=(1, 1), widths=(24, 48), heads=(2, 4), strides=(1, 2), stem=16),
    ),
    "focal": (
        "focal_tiny",
        dict(depths=(1, 1, 1, 1), widths=(12, 24, 24, 24), heads=(2, 2, 2, 2)),
    ),
}
SMALL = "coatnet, one block"
RESIZED = [family for family in FAMILIES if family not in ("CE", SMALL)]
PREPARED = dict(image_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), eval_crop=0.9)


@functools.cache
def model(family, classes, size=SIZE):
    name, fields = FAMILIES[family]
    module = registry.create_model(name, classes=classes, **fields)
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
    rng = np.random.default_rng(3)

    def scattered(path, leaf):  # zeros and ones of a fresh model would hide mistakes
        noise = rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
        return noise + 1 if path[-1].key in ("scale", "var") else noise

    return module, jax.tree.map_with_path(scattered, shapes)


def save(directory, module, variables, labels=None, **about):
    """A converted checkpoint, with names of its classes if there are any."""
    about = {"model": registry.describe(module), "preprocessing": PREPARED, **about}
    about |= {"converted": {"source": "timm", "name": "x"}} | ({"labels": labels} if labels else {})
    saved = manager.Checkpoints(directory / "checkpoints", schema.Checkpoints())
    saved.save(0, {"variables": variables}, metadata=about)
    saved.close()
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Colours, in folders that a split's hash does not divide."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pictures")
    for colour, rgb in COLOURS.items():
        for split in SPLITS:
            for i in range(4):
                picture = np.full((70, 90, 3), rgb) + rng.normal(0, 60, (70, 90, 3))
                file = root / split / colour / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(file), np.clip(picture, 0, 255).astype(np.uint8)[..., ::-1])
    return root


@pytest.fixture
def given(pictures, tmp_path):
    """A config whose preprocessing is not that of the checkpoints, and its data."""
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        "    return ConfigDict(dict(steps=1, batch_size=4, model=dict(name='coatnet_0'),\n"
        "        data=dict(name='folder', image_size=(32, 32), eval_splits=('validation',)),\n"
        "        eval=dict(every=0), log=dict(tensorboard=False),\n"
        "        optim=dict(learning_rate=1e-9, weight_decay=0.0)))\n"
    )
    return [f"--config={file}", f"--config.data.dir={pictures}"]


@pytest.fixture
def evaluate(capsys):
    """(workdir, *options) -> exit code; accuracy, loss and count; stderr."""

    def evaluate(workdir, *options):
        capsys.readouterr()
        code = main(["evaluate", f"--workdir={workdir}", *map(str, options), "--json"])
        out, error = capsys.readouterr()
        return code, json.loads(out)["validation"] if code == 0 else None, error

    return evaluate


def by_classify(workdir, root, size=None):
    """The share of right answers, and the mean of -log p, of the command `classify`."""
    files = sorted((root / "validation").rglob("*.png"))
    options = {"data.image_size": str(size)} if size else {}
    answers = list(classifier.load(workdir, overrides=options).classify(files, top=99))
    right = [a.best[0].name == f.parent.name for a, f in zip(answers, files, strict=True)]
    loss = [
        -np.log(next(g.probability for g in a.best if g.name == f.parent.name))
        for a, f in zip(answers, files, strict=True)
    ]
    return np.mean(right), np.mean(loss), len(files)


def same(found, expected):
    assert found["accuracy"] == expected[0] and found["count"] == expected[2]
    np.testing.assert_allclose(found["loss"], expected[1], rtol=2e-3)


# ------------------------------------------------------------ converted weights, sizes, classes


@pytest.mark.parametrize("family", RESIZED)
def test_a_converted_checkpoint_at_its_size_and_at_another(
    family, evaluate, given, pictures, tmp_path
):
    out = save(tmp_path / "out", *model(family, 3), labels=list(COLOURS))
    code, found, _ = evaluate(out, *given)
    assert code == 0
    same(found, by_classify(out, pictures))
    code, other, said = evaluate(out, *given, f"--config.data.image_size={LARGER}")
    assert code == 0 and "96x96" in said and "64x64" in said
    same(other, by_classify(out, pictures, LARGER))
    assert other["loss"] != found["loss"]


def test_a_table_that_fits_one_size_is_refused_by_the_field(evaluate, given, tmp_path):
    out = save(tmp_path / "out", *model("CE", 3), labels=list(COLOURS))
    assert evaluate(out, *given)[0] == 0
    for size in (LARGER, (66, 66)):
        code, _, error = evaluate(out, *given, f"--config.data.image_size={size}")
        assert code == 2 and "data.image_size" in error and "Traceback" not in error


def test_classes_in_another_order_and_some_of_them(evaluate, given, pictures, tmp_path):
    labels = ["red", "yellow", "green", "blue"]
    out = save(tmp_path / "out", *model(SMALL, 4), labels=labels)
    code, found, said = evaluate(out, *given)
    assert code == 0 and "3 of the checkpoint's 4" in said
    same(found, by_classify(out, pictures))
    moved = {pictures / split / "green": tmp_path / f"green_{split}" for split in SPLITS}
    for folder, place in moved.items():
        folder.rename(place)
    try:
        code, found, _ = evaluate(out, *given)
        same(found, by_classify(out, pictures))
        assert (code, found["count"]) == (0, 8)
    finally:
        for folder, place in moved.items():
            place.rename(folder)


def test_names_in_another_unicode_form_are_the_same(evaluate, given, pictures, tmp_path):
    known, labels = ["cafe\u0301", "owl"], ["owl", "caf\u00e9"]
    before, after = start(tmp_path / "start", SMALL, known, labels)
    for path in before:
        np.testing.assert_array_equal(after[path], before[path][..., ::-1])
    for split in SPLITS:
        (tmp_path / "data" / split).mkdir(parents=True)
        for label, colour in zip(labels, COLOURS, strict=False):
            (tmp_path / "data" / split / label).symlink_to(pictures / split / colour)
    out = save(tmp_path / "out", *model(SMALL, 2), labels=known)
    code, found, _ = evaluate(out, *given, f"--config.data.dir={tmp_path / 'data'}")
    assert code == 0 and found["count"] == 8


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [
        (3, ["red", "blue", "yellow"], "green"),
        (5, None, "3 classes, the checkpoint 5"),
        (0, None, "no classifier"),
    ],
)
def test_classes_that_cannot_be_matched_are_named(request, classes, labels, says):
    evaluate, given, tmp_path = map(request.getfixturevalue, ("evaluate", "given", "tmp_path"))
    out = save(tmp_path / "out", *model(SMALL, classes), labels=labels)
    code, _, error = evaluate(out, *given)
    assert code == 2 and says in error and "Traceback" not in error


def test_without_names_the_order_is_taken_and_said(evaluate, given, tmp_path):
    code, _, said = evaluate(save(tmp_path / "out", *model(SMALL, 3)), *given)
    assert code == 0 and "no names" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--config"),
        (["--config=configs/muse_iwslt14.py"], "muse_iwslt14.py"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["CONFIG", "--config.data.name=digits"], "data.name=digits"),
        (["CONFIG", "--config.data.image_size=(50, 50)"], "data.image_size"),
        (["CONFIG", "--config.data.image_size=(64, 64, 64)"], "data.image_size"),
        (["CONFIG", "--config.data.eval_splits=()"], "data.eval_splits"),
        (["CONFIG", "--config.model.classes=3"], "config.model.classes"),
        (["CONFIG", "--config.data.mean=(0.5, 0.5)"], "data.mean"),
        (["CONFIG", "--step=best"], "config.json"),
    ],
)
def test_what_is_missing_or_wrong_is_named(options, says, evaluate, given, tmp_path):
    out = save(tmp_path / "out", *model(SMALL, 3), labels=list(COLOURS))
    options = [*given, *options[1:]] if options[:1] == ["CONFIG"] else options
    code, _, error = evaluate(out, *options)
    assert code == 2 and says in error and error.count("localglobal evaluate") == 1


def test_a_run_is_evaluated_at_another_size_and_on_a_config(evaluate, given, pictures, tmp_path):
    name, fields = FAMILIES[SMALL]
    blocks = {"blocks.T.head_width": fields["blocks"]["T"]["head_width"]}
    fields = {"name": name, **{k: v for k, v in fields.items() if k != "blocks"}, **blocks}
    model = [f"--config.model.{name}={value}" for name, value in fields.items()]
    run = tmp_path / "run"
    assert main(["train", f"--workdir={run}", *given, *model]) == 0
    small, large = (
        evaluate(run, f"--config.data.image_size={size}") for size in ((32, 32), (48, 64))
    )
    assert small[0] == large[0] == 0 and small[1]["loss"] != large[1]["loss"]
    same(small[1], by_classify(run, pictures))
    same(large[1], by_classify(run, pictures, (48, 64)))
    assert evaluate(run, *given)[1] == small[1]


def test_a_converted_checkpoint_of_text_is_evaluated_too(evaluate, given, tmp_path):
    """On files of one's own, with the dictionaries it was converted with."""
    golden = ROOT / "tests" / "golden" / "muse_post"
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(36)))
    about = json.loads(golden.with_suffix(".json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(about["args"]))
    out, words = tmp_path / "out", str(tmp_path / "dict.txt")
    command = ["convert", "fairseq", f"{golden}.safetensors", f"--args={tmp_path}/args.json"]
    assert main([*command, "--dict", words, words, f"--out={out}"]) == 0
    pairs = [(f"w{i} w{2 * i} w{i + 3}", f"w{i + 1} w{3 * i}") for i in range(6)]
    (tmp_path / "validation.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in pairs))
    text = f"--config={ROOT}/configs/muse_iwslt14.py", "--config.task.beam=0"
    text += (f"--config.data.files=('{tmp_path}/{{split}}.tsv',)", "--config.data.tokenizer=dict")
    text += (f"--config.data.dicts=('{words}',)", "--config.data.eval_splits=('validation',)")
    code, found, said = evaluate(out, *text)
    assert code == 0, said
    module, variables = lg.load(out)
    apply = jax.jit(module.apply)
    vocabularies, total = tokenizers.load(out / "tokenizer"), 0.0
    for source, target in pairs:
        ids = vocabularies.target.encode([target])[0]
        inputs = vocabularies.source.encode([source])[0] + [EOS], [EOS, *ids]
        logits, _ = apply(variables, *(jnp.asarray([x]) for x in inputs))
        chosen = jax.nn.log_softmax(logits[0])[jnp.arange(len(ids) + 1), jnp.asarray([*ids, EOS])]
        total -= float(chosen.sum())
    assert found["count"] == 18
    np.testing.assert_allclose(found["nll"], total / 18, rtol=1e-3)
    code, _, said = evaluate(out, *given)
    assert code == 2 and "text" in said and "images" in said


# ------------------------------------------------------------ a start for fine-tuning


def leaves(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def start(tmp_path, family, known, labels, *, old=None):
    """(classifier before, the variables a run starts from), of a checkpoint with `known` names."""
    count = len(known) if old is None else old
    module, variables = model(family, count)
    out = save(tmp_path / "out", module, variables, labels=list(known))
    new = module.clone(classes=len(labels))
    shape = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    found = leaves(load.pretrained(str(out), new, (shape,), labels))
    before = leaves(variables)
    kept = [path for path in before if not path.split("/")[-2].endswith("classifier")]
    for path in kept:
        np.testing.assert_array_equal(before[path], found[path])
    shapes = jax.eval_shape(lambda x: new.init(jax.random.key(0), x, train=False), shape)
    assert {k: v.shape for k, v in leaves(shapes).items()} == {k: v.shape for k, v in found.items()}
    theirs = {path: before[path] for path in before.keys() - set(kept)}
    return theirs, {path: found[path] for path in found.keys() - set(kept)}


@pytest.mark.parametrize("family", RESIZED)
def test_a_classifier_is_kept_where_the_names_agree(family, tmp_path):
    before, after = start(tmp_path, family, ["cat", "dog"], ["cat", "dog"])
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])


@pytest.mark.parametrize("family", RESIZED)
@pytest.mark.parametrize("labels", [["dog", "cat", "owl"], ["owl", "cat"], ["dog"]])
def test_rows_follow_their_names(family, labels, tmp_path):
    known = ["cat", "dog", "owl"]
    before, after = start(tmp_path, family, known, labels)
    for path in before:
        for i, label in enumerate(labels):
            np.testing.assert_array_equal(
                after[path][..., i], before[path][..., known.index(label)]
            )


@pytest.mark.parametrize("family", RESIZED)
@pytest.mark.parametrize("labels", [["cat", "owl"], ["bus", "car"], ["cat", "dog", "owl"]])
def test_other_names_get_a_new_classifier(family, labels, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        _, after = start(tmp_path, family, ["cat", "dog"], labels)
    assert after and all(not np.any(leaf) for leaf in after.values())
    assert labels[-1] in caplog.text and f"{len(labels)} classes" in caplog.text


@pytest.mark.parametrize("family", RESIZED)
def test_a_backbone_without_a_classifier_gets_one(family, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        before, after = start(tmp_path, family, [], ["cat", "dog"], old=0)
    assert not before and after and all(not np.any(leaf) for leaf in after.values())
    assert "no classifier" in caplog.text and "2 classes" in caplog.text


def test_without_names_the_same_number_is_kept_and_another_is_not(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        before, after = start(tmp_path / "a", SMALL, [], ["cat", "dog"], old=2)
        assert "no names" in caplog.text
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    _, after = start(tmp_path / "b", SMALL, [], ["cat", "dog", "owl"], old=2)
    assert all(not np.any(leaf) for leaf in after.values())


def test_fine_tuning_a_run_on_other_classes(pictures, tmp_path, capsys):
    """The command line: (blue, green, red) weights on (blue, green, violet), and on a backbone."""
    folder = ROOT / "configs" / "finetune_folder.py"
    out = save(tmp_path / "out", *model(SMALL, 3), labels=list(COLOURS))
    bare = save(tmp_path / "bare", *model(SMALL, 0))
    other = tmp_path / "other"
    for split in SPLITS:
        for ours, theirs in (("blue", "blue"), ("green", "green"), ("red", "violet")):
            (other / split).mkdir(parents=True, exist_ok=True)
            (other / split / theirs).symlink_to(pictures / split / ours)
    for init in (out, bare):
        run = tmp_path / f"run_{init.name}"
        options = [f"--config={folder}:init={init},steps=1,size=tiny", f"--workdir={run}"]
        options += [f"--config.data.dir={other}", "--config.optim.learning_rate=1e-9"]
        options += ["--config.optim.ema=0.0", "--config.steps=1"]
        assert main(["train", *options]) == 0, capsys.readouterr().err
        found = lg.load(run)[1]["params"]["head"]["classifier"]["kernel"]
        assert found.shape[-1] == 3 and np.abs(found).max() < 1e-6
