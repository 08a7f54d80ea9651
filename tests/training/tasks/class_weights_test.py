# SPDX-License-Identifier: Apache-2.0
"""Weights of classes: where they come from, the loss by its formula, and unweighted metrics."""

import collections
import json
import pathlib

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from localglobal_jax import load
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.data.images import device_ops, pipeline
from localglobal_jax.models import mix_token
from localglobal_jax.training import evaluation, loop, metrics
from localglobal_jax.training.tasks import classification, create_task

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "coatnet_digits.py"
WEIGHTS = np.array([0.5, 3.0, 1.25], np.float32)
BOX = np.array([0, 0, 1, 2])  # two of the four tokens are the other image's


class Pixels(nn.Module):
    """Logits are the first three pixels; with `tokens`, also of a 2x2 grid, two of them mixed."""

    tokens: bool = False
    classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        factor = self.param("factor", nn.initializers.ones, ())
        logits = factor * x.reshape(x.shape[0], -1)[:, :3]
        if not self.tokens:
            return logits, {}
        aux = jnp.stack([logits * k for k in (1.0, 0.5, -1.0, 2.0)], 1)
        return logits, {"aux_logits": aux.reshape(-1, 2, 2, 3), "mix_box": jnp.asarray(BOX)}


def batch_of(n=6):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (n, 2, 2, 1)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 3, n), jnp.int32),
        "mask": jnp.asarray([1.0] * (n - 1) + [0.0]),
    }


def log_p(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_is_that_of_its_formula(kind, tokens, smoothing, mixup):
    run = validation.check(
        {
            "model": {"name": "m"},
            "task": {
                "loss": kind,
                "mixup": mixup,
                "label_smoothing": smoothing,
                "token_weight": 0.5,
            },
        }
    )
    model, batch, key = Pixels(tokens), batch_of(), jax.random.key(5)
    variables = model.init(key, jnp.zeros((1, 2, 2, 1)))
    found = classification.loss(model, run, variables, batch, key, weights=jnp.asarray(WEIGHTS))

    image, target = device_ops.normalize(batch["image"], run.data), np.eye(3)[batch["label"]]
    if mixup:
        image, target = device_ops.mix(
            jax.random.split(key)[0],
            image,
            jnp.asarray(target, jnp.float32),
            batch["mask"],
            mixup=mixup,
            cutmix=0.0,
        )
        assert 0 < float(target.max(-1).min()) < 1, "take another key: this one mixes nothing"
    target, mask = np.asarray(target, np.float64), np.asarray(batch["mask"])
    logits, out = model.apply(variables, image)
    own = float(mix_token.kept_share(jnp.asarray(BOX), (2, 2))) if tokens else 1.0
    assert not tokens or own == 0.5
    mixed = own * target + (1 - own) * target[::-1]

    def crossed(target, logits, weights):
        smooth = (1 - smoothing) * target + smoothing / 3
        if kind == "sigmoid":
            p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
            each = -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).sum(-1)
            return (weights * target).sum(-1) * each
        return -(weights * smooth * log_p(logits)).sum(-1)

    for weights, (total, weight) in (
        (WEIGHTS, (found.total, found.weight)),
        (WEIGHTS, found.metrics["weighted_loss"]),
        (np.ones(3), found.metrics["loss"]),
    ):
        each = crossed(mixed, logits, weights)
        if tokens:
            aux = np.asarray(out["aux_logits"])
            each = each + 0.5 * crossed(target[:, None, None], aux, weights).mean((1, 2))
        np.testing.assert_allclose(total, (each * mask).sum(), rtol=1e-5)
        np.testing.assert_allclose(weight, ((mixed @ weights) * mask).sum(), rtol=1e-6)
    plain = classification.loss(model, run, variables, batch, key)
    np.testing.assert_array_equal(plain.total, found.metrics["loss"][0])
    assert "weighted_loss" not in plain.metrics


def test_equal_weights_give_the_gradient_without_weights():
    run = validation.check({"model": {"name": "m"}, "task": {"label_smoothing": 0.1}})
    model, batch, key = Pixels(), batch_of(), jax.random.key(0)
    variables = model.init(key, jnp.zeros((1, 2, 2, 1)))

    def mean(params, weights):
        found = classification.loss(model, run, {"params": params}, batch, key, weights=weights)
        return found.total / found.weight

    gradient = [jax.grad(mean)(variables["params"], w) for w in (None, jnp.full(3, 7.0))]
    np.testing.assert_allclose(gradient[0]["factor"], gradient[1]["factor"], rtol=1e-5)


def folder(root, **counts):
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (root / "train" / name).mkdir(parents=True)
        (root / "test" / name).mkdir(parents=True)
        for i in range(n):
            picture = rng.integers(0, 256, (8, 8, 3), np.uint8)
            assert cv2.imwrite(str(root / "train" / name / f"{i}.png"), picture)
        assert cv2.imwrite(str(root / "test" / name / "0.png"), picture)
    return str(root)


def weights_of(options):
    source = pipeline.open_split(options, "train", train=True)
    names = pipeline.class_names(options)
    return classification.class_weights(options, names, source.classes, source)


@pytest.mark.parametrize("in_memory", [False, True])
def test_balanced_weights_of_a_folder(in_memory, tmp_path):
    directory = folder(tmp_path, cat=6, dog=3, eel=1)
    given = {"name": "folder", "dir": directory, "in_memory": in_memory}
    options = schema.Images(**given, class_weights="balanced")
    np.testing.assert_allclose(weights_of(options), [10 / 18, 10 / 9, 10 / 3], rtol=1e-12)
    named = schema.Images(**given, class_weights={"eel": 4.0, "cat": 0.5})
    assert weights_of(named) == [0.5, 1.0, 4.0]
    numbered = schema.Images(**given, class_weights={"2": 4.0, "cat": 0.5})  # of "St. Bernard"
    assert weights_of(numbered) == [0.5, 1.0, 4.0]
    listed = schema.Images(**given, class_weights=(1.0, 2.0, 3.0))
    assert weights_of(listed) == [1.0, 2.0, 3.0]
    assert weights_of(schema.Images(**given)) is None
    with pytest.raises(ValueError, match=r'data\.class_weights: "eal"; did you mean "eel"'):
        weights_of(schema.Images(**given, class_weights={"eal": 4.0}))
    with pytest.raises(ValueError, match=r"data\.class_weights=\(1\.0, 2\.0\) .* 3 classes"):
        weights_of(schema.Images(**given, class_weights=(1.0, 2.0)))


def test_a_name_that_is_a_number_is_a_name(tmp_path):
    """Grades 1 to 3 are classes 0 to 2, and "10" comes before "2"."""
    grades = folder(tmp_path / "grades", **{"1": 1, "2": 1, "3": 1})
    numbers = folder(tmp_path / "numbers", **{str(i): 1 for i in range(12)})
    for directory, given, place in ((grades, "1", 0), (grades, "3", 2), (numbers, "2", 4)):
        options = schema.Images(name="folder", dir=directory, class_weights={given: 5.0})
        expected = [1.0] * (3 if directory == grades else 12)
        expected[place] = 5.0
        assert weights_of(options) == expected
    zero = schema.Images(name="folder", dir=grades, class_weights={"0": 5.0})  # no name: a number
    assert weights_of(zero) == [5.0, 1.0, 1.0]


@pytest.mark.parametrize("weights", ["{'eel': 3.0}", "(1.0, 1.0, 3.0)", "balanced"])
def test_weights_are_no_obstacle_to_an_evaluation_on_some_of_the_classes(weights, tmp_path):
    given = {**small.IMAGES, "data.name": "folder", "data.mock": "False", "steps": "1"}
    given |= {"data.dir": folder(tmp_path / "all", cat=4, dog=4, eel=4), "batch_size": "4"}
    given |= {"data.class_weights": weights, "optim.warmup_steps": "0", "eval.batch_size": "4"}
    given |= {"data.eval_splits": "('test',)", "checkpoint.best": "test/mean_recall"}
    run = validation.check(loading.load(f"{CONFIG}:size=tiny", given))
    loop.train(run, tmp_path / "run")
    some = folder(tmp_path / "some", cat=1, dog=1)
    _, found = evaluation.evaluate(tmp_path / "run", overrides={"data.dir": some})
    assert found["test"]["count"] == 2 and 0 <= found["test"]["mean_recall"] <= 1


def test_a_class_without_pictures_has_no_weight(tmp_path):
    directory = folder(tmp_path, cat=6, dog=2)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "test" / "eel").mkdir()
    options = schema.Images(name="folder", dir=directory, class_weights="balanced")
    assert weights_of(options) == [8 / 12, 8 / 4, 0.0]


@pytest.mark.parametrize("in_memory", [False, True])
def test_balanced_weights_of_a_tfds_set(in_memory, data_dir):
    options = schema.Images(dir=data_dir, in_memory=in_memory, class_weights="balanced")
    source = pipeline.open_split(options, "train", train=True)
    seen = pipeline.open_split(options, "train", train=False)
    labels = collections.Counter(seen.batch(np.arange(len(seen)), None)["label"].tolist())
    assert source.class_counts() == [labels[i] for i in range(10)]
    expected = [len(source) / (10 * labels[i]) for i in range(10)]
    np.testing.assert_allclose(weights_of(options), expected)
    named = schema.Images(dir=data_dir, in_memory=in_memory, class_weights={"7": 2.0})
    assert weights_of(named) == [1.0] * 7 + [2.0, 1.0, 1.0]


def test_recall_is_the_mean_over_the_classes_that_occur():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 5, 40)
    mask = rng.integers(0, 2, 40)
    total = None
    for part in np.split(np.arange(40), 4):
        arrays = (jnp.asarray(x[part]) for x in (logits, labels, mask))
        sums = {"mean_recall": metrics.recalls(*arrays)}
        total = sums if total is None else metrics.merge(total, sums)
    found = metrics.compute(jax.device_get(total))
    live = mask > 0
    right = (logits.argmax(-1) == labels)[live]
    each = [right[labels[live] == c].mean() for c in np.unique(labels[live])]
    assert len(each) > 2
    np.testing.assert_allclose(found["mean_recall"], np.mean(each), rtol=1e-12)
    assert found["count"] == live.sum()
    nothing = {"mean_recall": (np.zeros(3, np.int32), np.zeros(3, np.int32))}
    assert np.isnan(metrics.compute(nothing)["mean_recall"])


def test_a_run_reports_the_mean_recall(data_dir, tmp_path):
    given = {
        **small.IMAGES,
        "steps": "2",
        "data.dir": data_dir,
        "data.class_weights": "{'3': 4}",
        "task.mixup": "0.8",
        "optim.accumulate": "2",
        "optim.warmup_steps": "0",
        "checkpoint.best": "test/mean_recall",
    }
    run = validation.check(loading.load(f"{CONFIG}:size=tiny", given))
    assert run.data.class_weights == {"3": 4.0}
    found = loop.train(run, tmp_path)
    assert 0 <= found["test"]["mean_recall"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "weighted_loss"} <= next(x for x in lines if x["split"] == "train").keys()
    loop.train(run, tmp_path)  # config.json gives the same weights
    _, again = evaluation.evaluate(tmp_path, overrides={"data.class_weights": "balanced"})
    assert again["test"]["mean_recall"] == pytest.approx(found["test"]["mean_recall"])
    _, without = evaluation.evaluate(tmp_path, overrides={"data.class_weights": "none"})
    assert "mean_recall" not in without["test"]
    assert without["test"]["loss"] == pytest.approx(found["test"]["loss"])


@pytest.mark.parametrize("text", ["{None: 1}", "{'a.b': 2}", "{3: 4.0}", "{", "1e999"])
def test_text_that_is_no_weights(text):
    with pytest.raises(ValueError, match=r"config\.data\.class_weights"):
        validation.check(loading.load(f"{CONFIG}:size=tiny", {"data.class_weights": text}))


@pytest.mark.parametrize(
    "value", ["even", {"cat": 0.0}, {"cat": -1.0}, {"cat": "x"}, (1.0, "a"), {3: 1.0}, 3.0, True]
)
def test_values_that_are_no_weights(value):
    given = {"model": {"name": "m"}, "data": {"class_weights": value}}
    with pytest.raises(ValueError, match=r"config\.data\.class_weights"):
        validation.check(given)


def test_a_wrong_class_is_known_before_anything_is_written(data_dir, tmp_path):
    given = {"data.dir": data_dir, "data.class_weights": "{'eleven': 2.0}"}
    run = validation.check(loading.load(f"{CONFIG}:size=tiny", given))
    with pytest.raises(ValueError, match=r"data\.class_weights"):
        loop.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert create_task(run.model_copy(update={"data": schema.Images(dir=data_dir)})).labels == ()


def test_a_run_with_the_sigmoid_loss_also_evaluates_it(data_dir, tmp_path):
    given = {**small.IMAGES, "steps": "2", "data.dir": data_dir, "task.loss": "sigmoid"}
    run = validation.check(
        loading.load(f"{CONFIG}:size=tiny", {**given, "optim.warmup_steps": "0"})
    )
    found = loop.train(run, tmp_path)["test"]
    module, variables = load(tmp_path)
    source = pipeline.open_split(run.data, "test", train=False)
    batch = source.batch(np.arange(len(source)), None)
    image = device_ops.normalize(jnp.asarray(batch["image"]), run.data)
    logits = np.asarray(jax.jit(module.apply)(variables, image)[0], np.float64)
    target = np.eye(10)[batch["label"]]
    p = 1 / (1 + np.exp(-logits))
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(-1).mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_record_without_a_label_ends_no_count(data_dir, monkeypatch):
    """It is a bad record when it is read for training."""
    source = pipeline.open_split(schema.Images(dir=data_dir, in_memory=False), "train", train=True)
    label, missing = source._reader.label, iter([KeyError("label"), TypeError("a float")])

    def some(record):
        if error := next(missing, None):
            raise error
        return label(record)

    monkeypatch.setattr(source._reader, "label", some)
    assert sum(source.class_counts()) == len(source) - 2
