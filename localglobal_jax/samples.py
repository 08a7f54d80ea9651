# SPDX-License-Identifier: Apache-2.0
"""Some examples of an evaluation, for people to look at beside the curves (``log.samples``)."""

import io
import itertools
import pathlib
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax import grad_cam, heat_map, hosts, schema, translate
from localglobal_jax.data import tokenizer
from localglobal_jax.tasks import HostBatch, Task, Variables
from localglobal_jax.tasks.classification import normalize

Shown = dict[str, str | np.ndarray]  # texts (Markdown) and pictures [h, w, 3], uint8, by name
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Samples:
    """The first examples of the first split: the same ones after every evaluation.

    Of images, where the model saw its answer (Grad-CAM); of sentences, source, reference and
    translation, and the cross-attention of the first. Only where one host has everything.
    """

    def __init__(self, run: schema.Run, task: Task, directory: pathlib.Path):
        self._run, self._task, self._directory = run, task, directory
        self._count = run.log.samples if hosts.count() == 1 and task.evaluators else 0
        self._translator: translate.Translator | None = None
        self._looked = jax.jit(
            lambda variables, image: grad_cam.grad_cam(task.model, variables, image)
        )

    def __call__(self, variables: Variables) -> Shown:
        """What `variables` make of them; {} if none are asked for."""
        if not self._count:
            return {}
        split, evaluator = next(iter(self._task.evaluators.items()))
        batch = next(evaluator.batches())
        run, rows = self._run, np.flatnonzero(batch["mask"].reshape(len(batch["mask"]), -1).any(1))
        first = {name: x[rows[: self._count]] for name, x in batch.items()}
        if isinstance(run, schema.TranslationRun):
            found = self._sentences(run, variables, first)
        else:
            found = self._pictures(run, variables, first)
        return {f"{split}/{name}": value for name, value in found.items()}

    def _pictures(self, run: Any, variables: Variables, batch: HostBatch) -> Shown:
        images = batch["image"]
        _, maps = self._looked(variables, normalize(jnp.asarray(images), run.data))
        overlays = [
            grad_cam.overlay(image, looked, WHOLE)
            for image, looked in zip(images, np.asarray(maps), strict=True)
        ]
        return {"looked_at": np.hstack(overlays)}

    def _sentences(
        self, run: schema.TranslationRun, variables: Variables, batch: HostBatch
    ) -> Shown:
        if self._translator is None:
            words = tokenizer.load(self._directory / tokenizer.DIRECTORY)
            assert words is not None, "the task has saved them"
            self._translator = translate.Translator(self._task.model, variables, words)
        translator = self._translator
        translator.variables = variables
        words = translator.tokenizers
        sources = [words.source.decode(row) for row in batch["source"]]
        references = [words.target.decode(row) for row in batch["target"]]
        found = translator.translate(
            sources, beam=run.task.beam or 1, length_penalty=run.task.length_penalty
        )
        lines = ["| source | reference | translation |", "| --- | --- | --- |"]
        for source, reference, translation in zip(sources, references, found, strict=True):
            best = translation.text if translation.hypotheses else ""
            cells = (words.source.plain(source), words.target.plain(reference), best)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        shown: Shown = {"translations": "\n".join(lines)}
        for source, translation in itertools.islice(zip(sources, found, strict=True), 1):
            if translation.hypotheses:
                looked = translator.attention(source, translation.hypotheses[0])
                shown["cross_attention"] = _drawn(looked)
        return shown


def _drawn(looked: translate.Attention) -> np.ndarray:
    file = io.BytesIO()
    heat_map.draw(
        file,
        looked.weights,
        rows=looked.target,
        columns=looked.source,
        row_name="translation",
        column_name="source",
        title=looked.title,
    )
    pixels: Any = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    return pixels[..., ::-1]
