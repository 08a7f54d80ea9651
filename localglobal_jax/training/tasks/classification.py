# SPDX-License-Identifier: Apache-2.0
"""Image classification: a batch is images and labels."""

import pathlib
from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from localglobal_jax.config import schema
from localglobal_jax.data import loader
from localglobal_jax.data.images import device_ops, pipeline
from localglobal_jax.data.images.device_ops import normalize
from localglobal_jax.models import mix_token
from localglobal_jax.models.registry import create_model
from localglobal_jax.training import losses, metrics
from localglobal_jax.training.tasks.task import Batch, Evaluator, HostBatch, Loss, Task, Variables

USE = """(found,) = lg.load_classifier("path/to/this/directory").classify(["picture.png"])
print(found.best[0].name, found.best[0].probability)

module, variables = lg.load("path/to/this/directory")
logits, _ = module.apply(variables, images, train=False)  # [b, h, w, c], normalised as below"""


def create(
    run: schema.ClassificationRun,
    *,
    shard: tuple[int, int] = (0, 1),
    parts: int | None = None,
    train: bool = True,
    workdir: pathlib.Path | None = None,
) -> Task:
    """Creates the task of `run`. Raises ValueError for a wrong model or missing data.

    `parts` is not used: every batch has ``batch_size`` rows.
    """
    classes, channels = pipeline.describe(run.data)
    spec = {"classes": classes, **run.model, "dtype": run.dtype}
    if "dtype" in run.model:
        raise ValueError("model.dtype is taken from the run: set config.dtype instead")
    model = create_model(**spec)
    if model.classes < classes:
        raise ValueError(
            f"model.classes={model.classes}, but {run.data.name} has {classes} classes: "
            "leave model.classes out to take the number of the data set"
        )
    shape = (*run.data.image_size, channels)
    example = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    try:
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), example)
    except (
        ValueError,
        MemoryError,
    ) as error:  # tables may grow with the square of the number of pixels
        where = f"config.model, on images of data.image_size={run.data.image_size}"
        raise ValueError(f"{where}: {error}") from error
    source = pipeline.open_split(run.data, run.data.train_split, train=True) if train else None

    def train_batches(start: int, stop: int) -> Iterator[HostBatch]:
        assert source is not None, "this task was created with train=False"
        return loader.train_batches(
            source,
            batch_size=run.batch_size,
            seed=run.seed,
            start=start,
            stop=stop,
            shard=shard,
            workers=run.data.workers,
        )

    size = f"{len(source)} images" if source else "images"
    return Task(
        model=model,
        model_spec=spec,
        inputs=(example,),
        loss=lambda variables, batch, key: loss(model, run, variables, batch, key),
        train_batches=train_batches,
        evaluators={
            split: create_evaluator(model, run, split, shard=shard)
            for split in run.data.eval_splits
        },
        items="images",
        order=size,
        use=USE,
        summary=f"{run.data.name}/{run.data.train_split}: {size} {'x'.join(map(str, shape))}, "
        f"{classes} classes",
        labels=pipeline.class_names(run.data),
    )


def create_evaluator(
    model: nn.Module, run: schema.ClassificationRun, split: str, *, shard: tuple[int, int]
) -> Evaluator:
    """Creates the evaluator of `split`: loss and accuracy."""
    source = pipeline.open_split(run.data, split, train=False)
    batch_size = run.eval.batch_size or run.batch_size

    def batches() -> Iterator[HostBatch]:
        return loader.eval_batches(
            source, batch_size=batch_size, shard=shard, workers=run.data.workers
        )

    def measure(variables: Variables, batch: Batch) -> metrics.Sums:
        logits, _ = model.apply(variables, normalize(batch["image"], run.data), train=False)
        return metrics.classification(logits, batch["label"], batch["mask"])

    row = jax.ShapeDtypeStruct((1, model.classes), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    names = (*jax.eval_shape(metrics.classification, row, one, one), "count")
    return Evaluator(batches, measure, names, size=lambda: len(source) - source.skipped)


def loss(
    model: nn.Module,
    run: schema.ClassificationRun,
    variables: Variables,
    batch: Batch,
    key: jax.Array,
) -> Loss:
    """Computes the cross-entropy of a training batch, on mixed images under MixUp or CutMix.

    For a model that also classifies every token ("aux_logits", VOLO) the mean loss of its tokens is
    added (arXiv 2104.10858, equation 3); without label maps of a teacher, a token has the label of
    its image. Where the model mixed tokens of two images ("mix_box"), the target of the class
    logits is the mixture of both labels.
    """
    mix_key, dropout_key = jax.random.split(key)
    image, mask = normalize(batch["image"], run.data), batch["mask"]
    target = jax.nn.one_hot(batch["label"], model.classes)
    if run.task.mixup or run.task.cutmix:
        image, target = device_ops.mix(
            mix_key, image, target, mask, mixup=run.task.mixup, cutmix=run.task.cutmix
        )
    (logits, found), collections = model.apply(
        variables,
        image,
        train=True,
        rngs={"dropout": dropout_key},
        mutable=[name for name in variables if name != "params"],
    )
    cross_entropy = partial(losses.cross_entropy, label_smoothing=run.task.label_smoothing)
    class_target = target
    if "mix_box" in found:
        own = mix_token.kept_share(found["mix_box"], found["aux_logits"].shape[1:3])
        class_target = own * target + (1 - own) * target[::-1]
    each = cross_entropy(logits, class_target)
    if "aux_logits" in found:
        token_target = jnp.broadcast_to(target[:, None, None], found["aux_logits"].shape)
        tokens = cross_entropy(found["aux_logits"], token_target).mean((1, 2))
        each = each + run.task.token_weight * tokens
    total, weight = jnp.sum(each * mask), jnp.sum(mask)
    sums = metrics.classification(logits, batch["label"], mask)
    return Loss(total, weight, {**sums, "loss": (total, weight)}, collections)
