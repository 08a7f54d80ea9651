# SPDX-License-Identifier: Apache-2.0
"""Whole little runs through the classification task, with everything turned on, on other sets."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tensorflow_datasets as tfds

from localglobal_jax.config import loading, validation
from localglobal_jax.data.images import device_ops
from localglobal_jax.inference import load
from localglobal_jax.parallel import placement
from localglobal_jax.profiling import collectives, hlo
from localglobal_jax.training import loop
from localglobal_jax.training.tasks import create_task

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "coatnet_digits.py"


def make_run(data_dir, **overrides):
    base = {"steps": "2", "optim.warmup_steps": "1", "data.dir": str(data_dir), "eval.every": "0"}
    fields = {**small.IMAGES, **base, **overrides}
    return validation.check(loading.load(f"{CONFIG}:size=tiny", fields))


def variables_of(task, image):
    return jax.jit(lambda: task.model.init(jax.random.key(0), jnp.zeros(image), train=False))()


EVERYTHING = {
    "dtype": "bfloat16",
    "optim.accumulate": "2",
    "optim.ema": "0.9",
    "task.mixup": "0.8",
    "task.cutmix": "1.0",
    "task.label_smoothing": "0.1",
    "data.flip": "true",
    "data.randaugment_layers": "2",
    "data.erase": "0.25",
    "model.drop_path": "0.2",
}


def test_everything_on(data_dir, tmp_path):
    """That it is the same twice, faults_test.py shows."""
    loop.train(make_run(data_dir, **EVERYTHING), tmp_path)
    _, variables = load.load(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def test_bfloat16_follows_float32(data_dir):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        task = create_task(make_run(data_dir, dtype=dtype, **{"model.drop_path": "0"}))
        batch = next(task.train_batches(0, 1))
        variables = variables_of(task, (1, 8, 8, 1))
        loss = jax.jit(task.loss)(variables, batch, jax.random.key(0))
        losses[dtype] = float(loss.total / loss.weight)
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["float32"], losses["bfloat16"], rtol=0.02)


@pytest.mark.parametrize(
    ("name", "size", "classes"), [("cifar10", 32, 10), ("imagenet2012", 64, 1000)]
)
def test_standard_names_train_on_tfds_mock_data(name, size, classes, tmp_path):
    split = "validation" if name == "imagenet2012" else "test"
    run = make_run(
        tmp_path / "data",
        batch_size="4",
        **{
            "model.layout": "C",  # attention would be over every pixel
            "data.name": name,
            "data.image_size": f"({size}, {size})",
            "data.crop": "resized",
            "data.eval_splits": split,
            "checkpoint.best": f"{split}/accuracy",
        },
    )
    with tfds.testing.mock_data(num_examples=6, policy=tfds.testing.MockPolicy.USE_CODE):
        result = loop.train(run, tmp_path / "run")
    assert result[split]["count"] == 6
    assert load.load(tmp_path / "run")[0].classes == classes


def test_mock_images_need_no_data(tmp_path):
    run = make_run(tmp_path / "nothing", **{"data.mock": "true"})
    assert loop.train(run, tmp_path / "run")["test"]["count"] == 256


def test_two_devices_give_the_loss_and_gradient_of_one(data_dir):
    run = make_run(data_dir, **{"model.drop_path": "0"})
    task = create_task(run)
    batch = next(task.train_batches(0, 1))
    variables = variables_of(task, (1, 8, 8, 1))

    def gradient(params, batch):
        loss = task.loss({**variables, "params": params}, batch, jax.random.key(0))
        return loss.total / loss.weight

    both = placement.Partitioner().global_batch(batch)
    assert len(both["image"].addressable_shards) == 2
    step = jax.jit(jax.value_and_grad(gradient))
    one, two = step(variables["params"], batch), step(variables["params"], both)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_devices_send_each_other_the_partners_of_mixup_as_bytes(data_dir):
    """Four times fewer than as float32; only they and a few sums pass between the devices."""
    task = create_task(make_run(data_dir, **{"task.mixup": "0.8", "model.drop_path": "0"}))
    batch = next(task.train_batches(0, 1))
    variables = variables_of(task, (1, 8, 8, 1))
    both = placement.Partitioner().global_batch(batch)
    program = hlo.Program(
        jax.jit(task.loss).lower(variables, both, jax.random.key(0)).compile().as_text()
    )
    found = [c for c in collectives.collectives(program) if math.prod(c.shape) >= image_size(both)]
    assert {c.dtype for c in found} == {"u8"}


def image_size(batch):
    """Returns the number of values that a device has of a batch's images."""
    return batch["image"].addressable_shards[0].data.size


def test_normalize_is_per_channel():
    options = validation.check(
        {"model": {"name": "m"}, "data": {"mean": (0.0, 0.5, 1.0), "std": (1.0, 0.5, 2.0)}}
    ).data
    image = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    np.testing.assert_allclose(device_ops.normalize(image, options)[0, 0, 0], [1, 1, 0])


def test_tokens_are_classified_too_and_mixed_tokens_meet_both_labels(tmp_path):
    fields = {"depths": (1, 1), "widths": (24, 24), "heads": (2, 2), "strides": (1, 2), "stem": 8}
    fields |= {"layout": "OS", "position": 2}
    run = validation.check(
        {
            "model": {"name": "volo", "mix_token": True, **fields},
            "data": {"name": "cifar10", "mock": True, "image_size": (64, 64)},
            "task": {"token_weight": 0.5},
        }
    )
    task = create_task(run)
    batch = next(task.train_batches(0, 1))
    batch = {k: jnp.asarray(v[:4]) for k, v in batch.items()}
    variables = jax.jit(task.model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    key = jax.random.key(3)

    def total(params):
        return task.loss({**variables, "params": params}, batch, key).total

    found, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
    assert all(np.any(g) for g in jax.tree.leaves(gradient["head"]))

    (logits, out), _ = jax.jit(
        functools.partial(task.model.apply, train=True, mutable=["batch_stats"])
    )(
        variables,
        device_ops.normalize(batch["image"], run.data),
        rngs={"dropout": jax.random.split(key)[1]},
    )
    top, left, bottom, right = np.asarray(out["mix_box"])
    assert bottom > top, "take another key: this one mixes nothing"
    own = 1 - (bottom - top) * (right - left) / 16
    label, row = np.asarray(batch["label"]), np.arange(4)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -(own * log_p[row, label] + (1 - own) * log_p[row, label[::-1]]).sum()
    tokens = np.asarray(jax.nn.log_softmax(out["aux_logits"])).mean((1, 2))
    expected += -0.5 * tokens[row, label].sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_what_a_bad_record_holds_does_not_matter(mixup):
    """Of a model that mixes the tokens of images; BatchNorm aside, which the stem here has not."""
    fields = {"depths": (1, 1), "widths": (24, 24), "heads": (2, 2), "strides": (1, 2), "stem": 8}
    fields |= {"layout": "OS", "position": 2, "mix_token": True}
    run = validation.check(
        {
            "model": {"name": "volo", **fields},
            "data": {"name": "cifar10", "mock": True, "image_size": (64, 64)},
            "task": {"mixup": mixup},
        }
    )
    task = create_task(run)
    batch = {k: jnp.asarray(v[:4]) for k, v in next(task.train_batches(0, 1)).items()}
    batch["mask"] = batch["mask"].at[3].set(0.0)
    variables = jax.jit(task.model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))

    @jax.jit
    def total(batch):
        return task.loss(variables, batch, jax.random.key(3)).total

    void = {
        **batch,
        "image": batch["image"].at[3].set(0),
        "label": batch["label"].at[3].set((batch["label"][3] + 1) % 10),
    }
    assert total(void) == total(batch) > 0


@pytest.mark.parametrize("mix_token", [False, True])
def test_a_volo_that_classifies_no_tokens_has_the_plain_loss(mix_token):
    fields = {"depths": (1,), "widths": (24,), "heads": (2,), "strides": (1,), "stem": 8}
    fields |= {"layout": "S", "position": 1, "class_blocks": 0, "aux_head": False}
    run = validation.check(
        {
            "model": {"name": "volo", "mix_token": mix_token, **fields},
            "data": {"name": "cifar10", "mock": True, "image_size": (16, 16)},
        }
    )
    if mix_token:  # whose labels would be nobody's
        with pytest.raises(ValueError, match="mix_token=True needs aux_head=True"):
            create_task(run)
        return
    task = create_task(run)
    batch = {k: jnp.asarray(v[:4]) for k, v in next(task.train_batches(0, 1)).items()}
    variables = jax.jit(task.model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    (logits, _), _ = jax.jit(
        functools.partial(task.model.apply, train=True, mutable=["batch_stats"])
    )(
        variables,
        device_ops.normalize(batch["image"], run.data),
        rngs={"dropout": jax.random.key(0)},
    )
    expected = -jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]].sum()
    found = jax.jit(task.loss)(variables, batch, jax.random.key(3)).total
    np.testing.assert_allclose(found, expected, 1e-5)
