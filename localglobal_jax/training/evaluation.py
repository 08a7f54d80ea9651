# SPDX-License-Identifier: Apache-2.0
"""Runs the evaluators of a task, in the training loop or on a saved checkpoint."""

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from localglobal_jax.checkpoints import gcs
from localglobal_jax.checkpoints.workdir import check_config, in_one_form
from localglobal_jax.config import loading, preprocessing, schema, validation, values
from localglobal_jax.convert import adapt
from localglobal_jax.data.images import pipeline
from localglobal_jax.inference import hub
from localglobal_jax.inference.load import (
    has_run,
    named,
    note_preprocessing,
    read_run,
    read_variables,
)
from localglobal_jax.models import EncoderDecoder
from localglobal_jax.models.registry import MODELS, create_model, image_channels
from localglobal_jax.parallel import multihost
from localglobal_jax.parallel.placement import Partitioner
from localglobal_jax.training import metrics
from localglobal_jax.training.tasks import Evaluator, HostBatch, Task, Variables, create_task

log = logging.getLogger(__name__)


class Evaluation:
    """The evaluators of a task, compiled once per function and shape of a batch."""

    def __init__(self, task: Task, partitioner: Partitioner):
        self._partitioner = partitioner
        self._evaluators = task.evaluators
        # By function: splits that share one share its programs.
        functions = {f for e in task.evaluators.values() for f in (e.metrics, e.predict) if f}
        self._compiled = {f: partitioner.compile_eval(f) for f in functions}

    def check_metric(self, best: str | None) -> None:
        """Raises ValueError unless `best` is one of the metrics, see `metrics.check_best`."""
        known = [f"{s}/{m}" for s, e in self._evaluators.items() for m in e.metric_names]
        metrics.check_best(best, known)

    def __call__(self, variables: Variables) -> dict[str, dict[str, float]]:
        """Returns ``{split: {metric: value}}``."""
        return {
            name: self._run(name, evaluator, variables)
            for name, evaluator in self._evaluators.items()
        }

    def _run(self, name: str, evaluator: Evaluator, variables: Variables) -> dict[str, float]:
        total, predicted = None, []
        measure = self._compiled[evaluator.metrics]
        for host_batch in evaluator.batches():
            batch = self._partitioner.global_batch(host_batch)
            sums = jax.device_get(measure(variables, batch))
            total = sums if total is None else metrics.merge(total, sums)
            if evaluator.predict:
                predict = self._compiled[evaluator.predict]
                predicted.append(jax.device_get(predict(variables, batch)))
        result = metrics.compute(total or {})
        if result["count"] != evaluator.size():
            raise RuntimeError(
                f"evaluated {result['count']} of the {evaluator.size()} examples of {name}: "
                "a batch was lost or counted twice"
            )
        return evaluator.finish(result, predicted)


def evaluate(
    workdir: str | os.PathLike[str],
    step: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    average: int = 1,
    config: str | os.PathLike[str] | ConfigDict | Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Evaluates a checkpoint of `workdir`, or of an exported folder or ``hf://owner/name``.

    Args:
      step: a number, "best", or None for the newest.
      overrides: changes of the config it was trained with, e.g. ``{"data.dir": "/data"}`` on
        another machine, values or texts; ``model`` cannot change. Another ``data.image_size``
        resizes the position tables; classes of other data are matched by their names.
      average: evaluates the mean over this many checkpoints, `step` and those before it.
      config: a config, or its ``FILE[:ARG]``, whose data is evaluated instead, prepared as for the
        checkpoint; a converted checkpoint needs it.

    Returns:
      The step, and ``{split: {metric: value}}``.

    >>> step, metrics = lg.evaluate("runs/digits")
    >>> step, list(metrics)
    (20, ['test'])
    """
    workdir, overrides = hub.local(workdir), overrides or {}
    files, exported = gcs.LocalMirror(workdir).local, hub.describe(workdir)
    for field in overrides:
        if field.split(".")[0] == "model":
            raise ValueError(
                f"config.{field}: the model of a checkpoint cannot change; leave it out"
            )
    if config is None and not has_run(files):
        _, _, metadata = read_variables(workdir, step, average)
        if "converted" in metadata:
            example = "configs/finetune_folder.py --config.data.dir=PICTURES"
            if _is_text(metadata):
                example = "configs/muse_iwslt14.py --config.data.files=\"('{split}.tsv',)\""
            raise ValueError(
                f"{workdir} is a converted checkpoint, without data: give a config, for example "
                f"--config {example}"
            )
    if config is None:
        changed = ConfigDict(values.tuples(read_run(files).model_dump()))
    else:
        if isinstance(config, str | os.PathLike):
            changed = loading.load(config)
        else:
            changed = loading.editable(copy.deepcopy(config))
        changed.init = None
    found, variables, metadata = read_variables(workdir, step, average)
    if config is None and not exported:
        check_config(files, found, metadata)
    where = f"--config {config}" if isinstance(config, str | os.PathLike) else "the config"
    _check_kind(validation.run_class(changed), metadata, where)
    if config is not None:
        changed.model = ConfigDict(_model_of(metadata))
        _prepare_as(changed, metadata, overrides)
    for field, value in overrides.items():
        change = loading.override if isinstance(value, str) else loading.override_value
        change(changed, field, value)
    run = validation.check(changed)
    partitioner = Partitioner(run.parallel)
    if not run.data.eval_splits:
        raise ValueError("data.eval_splits=() is empty: give a split to evaluate")
    field, rows = run.eval_rows
    partitioner.check_batch(rows, what=field)
    classes = None
    if isinstance(run, schema.ClassificationRun):
        run = run.model_copy(update={"model": _model_of(metadata)})  # with its number of classes
        classes = _match_classes(run.data, metadata)
    shard, parts = partitioner.shard, partitioner.batch_parts
    task = create_task(run, shard=shard, parts=parts, train=False, workdir=files)
    for evaluator in task.evaluators.values():
        if evaluator.summary and multihost.rank() == 0:
            log.info("data     %s", evaluator.summary)
    if isinstance(run, schema.ClassificationRun):
        variables = _fit(task, variables, run.data, preprocessing.of_checkpoint(metadata))
    if classes is not None:
        task = dataclasses.replace(task, evaluators=_renumbered(task.evaluators, classes))
    return found, Evaluation(task, partitioner)(partitioner.put(variables))


def _prepare_as(
    config: ConfigDict, metadata: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Sets the preprocessing of `config` to that of a checkpoint.

    Logs what it changes. Fields of `overrides` stay as the config has them.
    """
    for field, value in preprocessing.of_checkpoint(metadata).items():
        before = config.data.get(field) if "data" in config else None
        if f"data.{field}" not in overrides and before != value:
            loading.override_value(config, f"data.{field}", value)
            if before is not None:
                log.info("data     %s=%s of the checkpoint, not %s", field, value, before)


def _model_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``model`` section of a checkpoint, without the fields that its task sets."""
    of_task = ("dtype", "source_vocab", "target_vocab", "pad", "start", "end")
    return {k: v for k, v in values.tuples(metadata["model"]).items() if k not in of_task}


def _is_text(metadata: Mapping[str, Any]) -> bool:
    return issubclass(MODELS[metadata["model"]["name"]][0], EncoderDecoder)


def _check_kind(kind: type[schema.Run], metadata: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a run on text and a checkpoint of images, or the other way round."""
    text = _is_text(metadata)
    if text != issubclass(kind, schema.TranslationRun):
        kinds = ("images", "text") if text else ("text", "images")
        raise ValueError(
            f"{where} evaluates {kinds[0]}, but the checkpoint is a model of {kinds[1]}: "
            "give another config"
        )


def _match_classes(data: schema.Images, metadata: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the checkpoint's number of each class of the data, matched by names; None: the same.

    Raises ValueError for a class that the checkpoint does not have.
    """
    known, labels = map(in_one_form, (metadata.get("labels") or (), pipeline.class_names(data)))
    classes = create_model(**values.tuples(metadata["model"])).classes
    count, _ = pipeline.describe(data)
    where = f"data.dir={data.dir}" if data.name == "folder" else f"data.name={data.name}"
    if not classes:
        raise ValueError(
            "the checkpoint has no classifier: fine-tune it (`init`) before evaluating"
        )
    if not (known and labels):
        trained = (metadata.get("config") or {}).get("data") or {}
        same = data.name != "folder" and trained.get("name") == data.name and count <= classes
        if count != classes and not same:
            names = (
                "the names of its classes are not known" if not known else "the data has no names"
            )
            raise ValueError(
                f"{where} has {count} classes, the checkpoint {classes}, and {names}: give data "
                "with the same classes, or fine-tune (`init`) on these"
            )
        log.info("classes  %d, taken to be in the order of the checkpoint: no names", count)
        return None
    if labels == known:
        return None
    if unknown := [label for label in labels if label not in set(known)]:
        raise ValueError(
            f"{where} has classes that the checkpoint was not trained on: {named(unknown)}. It "
            f"was trained on {named(known, 20)}. Give data of these classes, all or "
            "some, or fine-tune (`init`) on the new ones"
        )
    log.info(
        "classes  %d of the checkpoint's %d, matched by name; each answer is one of all %d",
        *(len(labels), len(known), len(known)),
    )
    return np.array([known.index(label) for label in labels], np.int32)


def _renumbered(evaluators: Mapping[str, Evaluator], classes: np.ndarray) -> dict[str, Evaluator]:
    """Returns evaluators whose batches have the checkpoint's numbers of the classes as labels."""

    def renumbered(evaluator: Evaluator) -> Evaluator:
        def batches() -> Iterator[HostBatch]:
            for batch in evaluator.batches():
                yield {**batch, "label": classes[batch["label"]]}

        return dataclasses.replace(evaluator, batches=batches)

    return {name: renumbered(evaluator) for name, evaluator in evaluators.items()}


def _fit(
    task: Task, variables: Variables, data: schema.Images, trained: Mapping[str, Any]
) -> Variables:
    """Returns the variables for the images of `task`; logs a size other than that of training.

    Raises ValueError, naming the field, where they cannot be resized.
    """
    size, channels = trained.get("image_size"), task.inputs[0].shape[-1]
    wanted = image_channels(variables)
    if channels != wanted:
        raise ValueError(
            f"data.name={data.name} has images of {channels} channels, the checkpoint is of images "
            f"with {wanted}"
        )
    try:
        fitted = adapt.fit(task.model, variables, *task.inputs)
    except ValueError as error:
        raise ValueError(f"data.image_size={data.image_size}: {error}") from error
    note_preprocessing(data, trained, "the checkpoint was trained with", ("mean", "std"))
    if size and tuple(size) != tuple(data.image_size):
        log.info(
            "size     %dx%d; the checkpoint is of %dx%d, its position tables are resized",
            *(*data.image_size, *size),
        )
    return fitted
