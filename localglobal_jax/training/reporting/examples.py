# SPDX-License-Identifier: Apache-2.0
"""Examples of an evaluation, logged beside the curves of a run (``log.samples``)."""

import io
import logging
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.images.device_ops import normalize
from localglobal_jax.data.text import pairs, tokenizers
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference.translator import Attention, Translator
from localglobal_jax.parallel import multihost
from localglobal_jax.training.tasks import Task, Variables

Shown = dict[str, str | np.ndarray]  # Markdown texts, and pictures uint8 [h, w, 3], by name
log = logging.getLogger(__name__)


class ExampleLogger:
    """Makes examples of the first evaluation split, the same ones after every evaluation.

    For images a Grad-CAM overlay; for sentences the source, reference and translation, and the
    cross-attention of the first sentence. Runs of several hosts make none.
    """

    def __init__(self, run: schema.Run, directory: pathlib.Path):
        seen = run.log.tensorboard or run.log.wandb
        alone = multihost.count() == 1 and run.data.eval_splits
        self._run, self._directory = run, directory
        self._count = run.log.samples if seen and alone else 0
        self._found: Callable[[Task, Variables], Shown] | None = None

    def __call__(self, task: Task, variables: Variables) -> Shown:
        """Returns the examples by name; {} if ``log.samples`` is 0 or on a (logged) error."""
        if not self._count:
            return {}
        split = self._run.data.eval_splits[0]
        try:
            if self._found is None:
                self._found = self._open(split)
            found = self._found(task, variables)
        except Exception as error:
            log.warning("log.samples: %s: %s", type(error).__name__, error)
            return {}
        return {f"{schema.evaluation_name(split)}/{name}": value for name, value in found.items()}

    def _open(self, split: str) -> Callable[[Task, Variables], Shown]:
        run, directory = self._run, self._directory
        if isinstance(run, schema.TranslationRun):
            text = pairs.read(run.data, split)
            chosen = [int(i) for i in spread(len(text.sources), self._count)]
            both = [(text.sources[i], text.targets[i]) for i in chosen]
            vocabularies = tokenizers.load(directory / tokenizers.DIRECTORY)
            assert vocabularies is not None, "Task.save has written them"
            return partial(_sentences, run, both, vocabularies)
        assert isinstance(run.data, schema.Images)
        options = run.data.model_copy(update={"in_memory": False})  # a few images are read, once
        source = pipeline.open_split(options, split, train=False)
        batch = source.batch(spread(len(source), self._count), None)
        return partial(_pictures, options, batch["image"][batch["mask"] > 0], {})


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices in [0, count), evenly spread: data may be sorted by class."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _pictures(
    options: schema.Images,
    shown: np.ndarray,
    compiled: dict[Any, Callable[..., Any]],  # by model
    task: Task,
    variables: Variables,
) -> Shown:
    if not len(shown):
        return {}
    pixels = normalize(jnp.asarray(shown), options)
    explain = compiled.setdefault(task.model, jax.jit(partial(grad_cam.grad_cam, task.model)))
    _, maps = explain(variables, pixels)
    both = zip(shown, np.asarray(maps), strict=True)
    return {"looked_at": np.hstack([grad_cam.overlay(image, found) for image, found in both])}


def _sentences(
    run: schema.TranslationRun,
    both: Sequence[tuple[str, str]],
    vocabularies: tokenizers.Tokenizers,
    task: Task,
    variables: Variables,
) -> Shown:
    translator = Translator(task.model, variables, vocabularies)
    found = translator.translate(
        [source for source, _ in both],
        beam=run.task.beam or 1,
        length_penalty=run.task.length_penalty,
    )
    lines = ["| source | reference | translation |", "| --- | --- | --- |"]
    for (source, reference), translation in zip(both, found, strict=True):
        best = translation.text if translation.hypotheses else ""
        cells = (vocabularies.source.plain(source), vocabularies.target.plain(reference), best)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    shown: Shown = {"translations": "\n".join(lines)}
    if found and found[0].hypotheses:
        shown["cross_attention"] = _drawn(translator.attention(both[0][0], found[0].hypotheses[0]))
    return shown


def _drawn(attention: Attention) -> np.ndarray:
    file = io.BytesIO()
    attention.draw(file)
    pixels: Any = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    return pixels[..., ::-1]
