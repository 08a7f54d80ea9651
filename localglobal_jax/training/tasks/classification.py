# SPDX-License-Identifier: Apache-2.0
"""Image classification: a batch is images and labels."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config import schema, validation
from localglobal_jax.data import loader
from localglobal_jax.data.images import device_ops, folder, pipeline
from localglobal_jax.data.images.device_ops import normalize
from localglobal_jax.models import mix_token
from localglobal_jax.models.registry import create_model
from localglobal_jax.parallel import multihost
from localglobal_jax.training import losses, metrics
from localglobal_jax.training.tasks.task import Batch, Evaluator, HostBatch, Loss, Task, Variables

USE = """(found,) = lg.load_classifier("path/to/this/directory").classify(["picture.png"])
print(found.best[0].name, found.best[0].probability)

module, variables = lg.load("path/to/this/directory")
logits, _ = module.apply(variables, images, train=False)  # [b, h, w, c], normalised as above"""


@folder.listed_once()
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
    if run.data.label_maps and (run.task.mixup or run.task.cutmix):
        raise ValueError("data.label_maps are not mixed: set task.mixup=0 and task.cutmix=0")
    if run.data.label_maps and not getattr(model, "aux_head", False):
        raise ValueError(
            f"data.label_maps are labels of tokens, which {run.model['name']} does not classify: "
            "take a VOLO with aux_head=True"
        )
    source = pipeline.open_split(run.data, run.data.train_split, train=True) if train else None
    names = pipeline.class_names(run.data)
    # evaluation has no weights, and may have pictures of some of the classes
    weights = class_weights(run.data, names, classes, source) if source else None
    factors = None
    if weights is not None:  # classes that the data set does not have are never seen
        factors = jnp.asarray([*weights, *[1.0] * (model.classes - classes)], jnp.float32)

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
        loss=lambda variables, batch, key: loss(model, run, variables, batch, key, weights=factors),
        train_batches=train_batches,
        evaluators=create_evaluators(model, run, shard=shard),
        items="images",
        order=source.order if source else size,
        records=lambda: source.records if source else (),
        use=USE,
        summary=f"{run.data.name}/{run.data.train_split}: {size} {'x'.join(map(str, shape))}, "
        f"{classes} classes{_shown(weights)}",
        labels=names,
    )


def class_weights(
    options: schema.Images,
    names: Sequence[str],
    classes: int,
    source: pipeline.ImageSource,
) -> list[float] | None:
    """Returns the factor of every class in the training loss; None if all are 1.

    "balanced" is n / (classes * images of the class), as in scikit-learn, over the classes with
    images of `source`; a class without any has 0.

    Raises ValueError for a class that the data set does not have, or another number of weights.
    """
    given = options.class_weights
    if isinstance(given, Mapping):
        numbers = tuple(map(str, range(classes)))
        known = names or numbers
        for name in given:
            if name not in known and name not in numbers:
                raise validation.unknown("class in data.class_weights:", name, known)
        # a name that is a number, such as a grade, is a name
        by_number = {number: x for number, x in given.items() if number not in known}
        return [given.get(n, by_number.get(i, 1.0)) for n, i in zip(known, numbers, strict=True)]
    if isinstance(given, tuple):
        if len(given) != classes:
            raise ValueError(
                f"data.class_weights={given} are {len(given)} weights, but {options.name} has "
                f"{classes} classes: give one per class, or names, such as {{'{0}': 2.0}}"
            )
        return [*given]
    if given == "none":
        return None
    counts = source.class_counts()
    there = sum(count > 0 for count in counts)
    return [sum(counts) / (there * count) if count else 0.0 for count in counts]


def _shown(weights: Sequence[float] | None) -> str:
    if weights is None:
        return ""
    more = ", ..." if len(weights) > 20 else ""
    return f", weights {', '.join(f'{w:.4g}' for w in weights[:20])}{more}"


def create_evaluators(
    model: nn.Module, run: schema.ClassificationRun, *, shard: tuple[int, int]
) -> dict[str, Evaluator]:
    """Creates the evaluator of every split: loss and accuracy, by one function."""

    def measure(variables: Variables, batch: Batch) -> metrics.Sums:
        logits, _ = model.apply(variables, normalize(batch["image"], run.data), train=False)
        return measured(logits, batch["label"], batch["mask"])

    def measured(logits: jax.Array, label: jax.Array, mask: jax.Array) -> metrics.Sums:
        sums = metrics.classification(logits, label, mask)
        if run.task.loss == "sigmoid":
            each = losses.binary_cross_entropy(logits, jax.nn.one_hot(label, logits.shape[-1]))
            sums["loss"] = jnp.sum(jnp.where(mask > 0, each, 0)), sums["loss"][1]
        if run.data.class_weights != "none":
            sums["mean_recall"] = metrics.recalls(logits, label, mask)
        return sums

    row = jax.ShapeDtypeStruct((1, model.classes), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    names = (*jax.eval_shape(measured, row, one, one), "count")

    def create_evaluator(split: str) -> Evaluator:
        source = pipeline.open_split(run.data, split, train=False)

        def batches() -> Iterator[HostBatch]:
            return loader.eval_batches(
                source,
                batch_size=run.eval.batch_size or run.batch_size,
                shard=shard,
                workers=run.data.workers,
            )

        def size() -> int:
            """Number of images that are not bad. Every host must call it: each has read a part."""
            if not run.data.max_bad_records:
                return len(source)
            bad = np.full(min(run.data.max_bad_records, len(source)), -1, np.int32)
            bad[: len(source.bad)] = sorted(source.bad)
            return len(source) - len({*multihost.all_gather(bad).tolist()} - {-1})

        return Evaluator(batches, measure, names, size)

    return {schema.evaluation_name(name): create_evaluator(name) for name in run.data.eval_splits}


def loss(
    model: nn.Module,
    run: schema.ClassificationRun,
    variables: Variables,
    batch: Batch,
    key: jax.Array,
    *,
    weights: jax.Array | None = None,
) -> Loss:
    """Computes the cross-entropy of a training batch, on mixed images under MixUp or CutMix.

    With `weights` of the classes (``float32 [classes]``) the loss is sum_c w_c t_c (-log p_c) over
    sum_c w_c t'_c, both summed over the images, as in PyTorch: t is the label, mixed and smoothed,
    t' is not smoothed. Under ``task.loss=sigmoid`` an image has the weight sum_c w_c t'_c. The
    reported "loss" is without weights, "weighted_loss" is with them.

    For a model that also classifies every token ("aux_logits", VOLO) the mean loss of its tokens is
    added (arXiv 2104.10858, equation 3). The label of a token is that of the teacher's map
    ("label_map" in the batch), else that of its image. Where the model mixed tokens of two images
    ("mix_box"), the target of the class logits is the mixture of both labels.
    """
    mix_key, dropout_key = jax.random.split(key)

    def inputs(image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        return normalize(image, run.data), jax.nn.one_hot(label, model.classes)

    mask = batch["mask"]
    image, target = inputs(batch["image"], batch["label"])
    if run.task.mixup or run.task.cutmix:
        image, target = device_ops.mix(
            mix_key,
            image,
            target,
            mask,
            mixup=run.task.mixup,
            cutmix=run.task.cutmix,
            partners=inputs(batch["image"][::-1], batch["label"][::-1]),
        )
    if getattr(model, "mix_token", False):
        # the partner of a bad record mixes with a copy of itself, and so stays as it is
        real = mask > 0
        image = jnp.where(real[:, None, None, None], image, image[::-1])
        target = jnp.where(real[:, None], target, target[::-1])
    (logits, found), collections = model.apply(
        variables,
        image,
        train=True,
        rngs={"dropout": dropout_key},
        mutable=[name for name in variables if name != "params"],
    )
    class_target = target
    if "mix_box" in found:
        own = mix_token.kept_share(found["mix_box"], found["aux_logits"].shape[1:3])
        class_target = own * target + (1 - own) * target[::-1]

    def summed(cross_entropy: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        each = cross_entropy(logits, class_target)
        if "aux_logits" in found:
            token_target = jnp.broadcast_to(target[:, None, None], found["aux_logits"].shape)
            if "label_map" in batch:
                grid, classes = found["aux_logits"].shape[1:3], found["aux_logits"].shape[3]
                token_target = device_ops.token_targets(
                    batch["label_map"], batch["label_box"], grid, classes
                )
            tokens = cross_entropy(found["aux_logits"], token_target).mean((1, 2))
            each = each + run.task.token_weight * tokens
        return jnp.sum(each * mask)

    total = summed(_loss_of(run.task))
    weight = jnp.sum(mask)
    sums = metrics.classification(logits, batch["label"], mask)
    sums = {**sums, "loss": (total, weight)}
    if weights is not None:
        total = summed(_loss_of(run.task, weights))
        weight = jnp.sum(mask * (class_target @ weights))
        sums["weighted_loss"] = total, weight
    return Loss(total, weight, sums, collections)


def _loss_of(
    options: schema.Classification, weights: jax.Array | None = None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the loss per logits and target (a distribution over the classes)."""
    smoothing = options.label_smoothing

    def weighted(logits: jax.Array, target: jax.Array) -> jax.Array:
        assert weights is not None
        factors = jnp.broadcast_to(weights, target.shape)
        if options.loss == "softmax":
            return losses.cross_entropy(logits, factors * losses.smooth(target, smoothing))
        each = losses.binary_cross_entropy(logits, losses.smooth(target, smoothing))
        return jnp.sum(factors * target, -1) * each

    def plain(logits: jax.Array, target: jax.Array) -> jax.Array:
        if options.loss == "softmax":
            return losses.cross_entropy(logits, target, label_smoothing=smoothing)
        return losses.binary_cross_entropy(logits, losses.smooth(target, smoothing))

    return plain if weights is None else weighted
