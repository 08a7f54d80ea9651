# SPDX-License-Identifier: Apache-2.0
"""Classification: a batch is images and labels."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from localglobal_jax import arrays, losses, metrics, schema
from localglobal_jax.data import images, loader, mixing
from localglobal_jax.models import create_model
from localglobal_jax.tasks.task import Batch, Evaluator, HostBatch, Loss, Task, Variables


def create(run: schema.ClassificationRun, *, shard: tuple[int, int] = (0, 1)) -> Task:
    """The task of `run`; opens its data, so a missing data set is an error here."""
    train = images.open_split(run.data, run.data.train_split, train=True)
    spec = {"classes": train.classes, **run.model, "dtype": run.dtype}
    if spec["classes"] < train.classes:
        raise ValueError(
            f"model.classes={spec['classes']}, but {run.data.name} has {train.classes} classes: "
            "leave model.classes out to take the data set's"
        )
    model = create_model(**spec)
    shape = (*run.data.image_size, train.channels)
    return Task(
        model=model,
        model_spec=spec,
        inputs=(jax.ShapeDtypeStruct((2, *shape), jnp.float32),),
        loss=lambda variables, batch, key: loss(model, run, variables, batch, key),
        train_batches=lambda start, stop: loader.train_batches(
            train,
            batch_size=run.batch_size,
            seed=run.seed,
            start=start,
            stop=stop,
            shard=shard,
        ),
        evaluators={
            split: create_evaluator(model, run, split, shard=shard)
            for split in run.data.eval_splits
        },
        items="images",
        summary=f"{run.data.name}/{run.data.train_split}: {len(train)} images "
        f"{'x'.join(map(str, shape))}, {train.classes} classes",
    )


def create_evaluator(
    model: nn.Module, run: schema.ClassificationRun, split: str, *, shard: tuple[int, int]
) -> Evaluator:
    """Loss and accuracy on the whole of `split`."""
    source = images.open_split(run.data, split, train=False)
    batch_size = run.eval.batch_size or run.batch_size

    def batches() -> Iterator[HostBatch]:
        return loader.eval_batches(source, batch_size=batch_size, shard=shard)

    def measure(variables: Variables, batch: Batch) -> metrics.Sums:
        logits, _ = model.apply(variables, normalize(batch["image"], run.data), train=False)
        return metrics.classification(logits, batch["label"], batch["mask"])

    return Evaluator(batches, measure, size=lambda: len(source) - source.skipped)


def normalize(image: UInt8[Array, "b h w c"], options: schema.Images) -> Float[Array, "b h w c"]:
    """Bytes to float32: ``(x / 255 - mean) / std`` per channel."""
    pixels = image.astype(jnp.float32) / 255
    mean, std = (arrays.per_channel(jnp.array(v), pixels) for v in (options.mean, options.std))
    return (pixels - mean) / std


def loss(
    model: nn.Module,
    run: schema.ClassificationRun,
    variables: Variables,
    batch: Batch,
    key: jax.Array,
) -> Loss:
    """Cross-entropy of a training batch, on mixed images if MixUp or CutMix are on."""
    mix_key, dropout_key = jax.random.split(key)
    image, mask = normalize(batch["image"], run.data), batch["mask"]
    target = jax.nn.one_hot(batch["label"], model.classes)
    if run.task.mixup or run.task.cutmix:
        image, target = mixing.mix(
            mix_key, image, target, mask, mixup=run.task.mixup, cutmix=run.task.cutmix
        )
    (logits, _), collections = model.apply(
        variables,
        image,
        train=True,
        rngs={"dropout": dropout_key},
        mutable=[name for name in variables if name != "params"],
    )
    each = losses.cross_entropy(logits, target, label_smoothing=run.task.label_smoothing)
    total, weight = jnp.sum(each * mask), jnp.sum(mask)
    sums = metrics.classification(logits, batch["label"], mask)
    return Loss(total, weight, {**sums, "loss": (total, weight)}, collections)
