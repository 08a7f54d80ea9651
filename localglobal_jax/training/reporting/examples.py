# SPDX-License-Identifier: Apache-2.0
"""Some examples of an evaluation, for people to look at beside the curves (``log.samples``)."""

import io
import logging
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.images.device_ops import normalize
from localglobal_jax.data.text import pairs, tokenizers
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference import translator as translate
from localglobal_jax.parallel import multihost
from localglobal_jax.training.reporting.html.facts import Confusion, Picture, Run, Sample
from localglobal_jax.training.tasks import Task, Variables

Shown = dict[str, str | np.ndarray]  # texts (Markdown) and pictures [h, w, 3], uint8, by name
log = logging.getLogger(__name__)


class ExampleLogger:
    """Examples of the first split, evenly spread: the same ones after every evaluation.

    Of images, where the model saw its answer (Grad-CAM); of sentences, source, reference and
    translation, and the cross-attention of the first. Only where one host has everything.
    """

    def __init__(self, run: schema.Run, directory: pathlib.Path):
        seen = run.log.tensorboard or run.log.wandb
        alone = multihost.count() == 1 and run.data.eval_splits
        self._run, self._directory = run, directory
        self._count = run.log.samples if seen and alone else 0
        self._found: Callable[[Task, Variables], Shown] | None = None

    def __call__(self, task: Task, variables: Variables) -> Shown:
        """What `variables` make of them; {} if none are asked for. No reason to end a run."""
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
        return {f"{split}/{name}": value for name, value in found.items()}

    def _open(self, split: str) -> Callable[[Task, Variables], Shown]:
        run, directory = self._run, self._directory
        if isinstance(run, schema.TranslationRun):
            text = pairs.read(run.data, split)
            chosen = [int(i) for i in spread(len(text.sources), self._count)]
            both = [(text.sources[i], text.targets[i]) for i in chosen]
            words = tokenizers.load(directory / tokenizers.DIRECTORY)
            assert words is not None, "the task has saved them"
            return partial(_sentences, run, both, words)
        assert isinstance(run.data, schema.Images)
        options = run.data.model_copy(update={"in_memory": False})  # a few, once
        source = pipeline.open_split(options, split, train=False)
        batch = source.batch(spread(len(source), self._count), None)
        return partial(_pictures, options, batch["image"][batch["mask"] > 0])


def spread(count: int, most: int) -> np.ndarray:
    """Numbers of `most` examples of `count`, over all of them: they may lie class by class."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _pictures(options: schema.Images, shown: np.ndarray, task: Task, variables: Variables) -> Shown:
    if not len(shown):
        return {}
    pixels = normalize(jnp.asarray(shown), options)
    _, maps = jax.jit(partial(grad_cam.grad_cam, task.model))(variables, pixels)
    both = zip(shown, np.asarray(maps), strict=True)
    return {"looked_at": np.hstack([grad_cam.overlay(image, found) for image, found in both])}


def _sentences(
    run: schema.TranslationRun,
    both: Sequence[tuple[str, str]],
    words: tokenizers.Tokenizers,
    task: Task,
    variables: Variables,
) -> Shown:
    translator = translate.Translator(task.model, variables, words)
    found = translator.translate(
        [source for source, _ in both],
        beam=run.task.beam or 1,
        length_penalty=run.task.length_penalty,
    )
    lines = ["| source | reference | translation |", "| --- | --- | --- |"]
    for (source, reference), translation in zip(both, found, strict=True):
        best = translation.text if translation.hypotheses else ""
        cells = (words.source.plain(source), words.target.plain(reference), best)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    shown: Shown = {"translations": "\n".join(lines)}
    if found and found[0].hypotheses:
        shown["cross_attention"] = _drawn(translator.attention(both[0][0], found[0].hypotheses[0]))
    return shown


def _drawn(looked: translate.Attention) -> np.ndarray:
    file = io.BytesIO()
    looked.draw(file)
    pixels: Any = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    return pixels[..., ::-1]


MOST = 10_000  # images of a confusion matrix
ROWS = 64  # at a time: this may be a laptop, and the run's batch that of a pod
SHOWN = 3, 2  # images, sentences
WORDS = 4, 24  # of a sentence that is shown, if there are such
SIDE = 192  # pixels of an image on the page


def classify(
    run: Run, config: schema.ClassificationRun, module: nn.Module, variables: Variables
) -> None:
    """The confusion matrix of the first split, and where the model looks in some of its images."""
    options = config.data.model_copy(update={"in_memory": False})  # some images, once each
    split = options.eval_splits[0]
    source = pipeline.open_split(options, split, train=False)
    known = pipeline.class_names(options)
    classes = [*known] + [str(i) for i in range(len(known), getattr(module, "classes", 0))]
    counts = np.zeros((len(classes), len(classes)), np.int64)

    @jax.jit
    def predict(variables: Variables, image: jax.Array) -> jax.Array:
        return module.apply(variables, normalize(image, options), train=False)[0].argmax(-1)

    # evenly spread, as the images of a folder lie there class by class
    chosen = np.linspace(0, len(source) - 1, min(len(source), MOST)).astype(np.int64)
    rows = min(ROWS, len(chosen))
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        batch = source.batch(np.resize(part, rows), None)  # one shape, compiled once
        predicted = np.asarray(predict(variables, jnp.asarray(batch["image"])))
        real = (batch["mask"] > 0) & (np.arange(rows) < len(part))
        np.add.at(counts, (batch["label"][real], predicted[real]), 1)
    whole = f" of {len(source):,}, evenly spread" if len(source) > MOST else ""
    run.confusion = Confusion(split, f"{counts.sum():,} images{whole}", classes, counts)

    shown = source.batch(chosen[:: math.ceil(len(chosen) / SHOWN[0])], None)
    pixels = normalize(jnp.asarray(shown["image"]), options)
    logits, seen = jax.jit(partial(grad_cam.grad_cam, module))(variables, pixels)
    attended = look(module, variables, pixels)
    for i in np.flatnonzero(shown["mask"]):
        maps = [np.asarray(found[i]) for found in (attended, seen) if found is not None]
        caption = f"{classes[shown['label'][i]]}, taken for {classes[int(logits[i].argmax())]}"
        run.looks.append(_picture(shown["image"][i], maps, caption))


def look(module: nn.Module, variables: Variables, pixels: jax.Array) -> np.ndarray | None:
    """``[b, h, w]``: how much its last attention over the whole grid looks at every place.

    The mean over heads and over the places that look, which sums to 1. None if it has none.
    """

    def order(found: tuple[str, Any]) -> list[Any]:  # block10 comes after block9
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", found[0])]

    @jax.jit  # so that the weights of all but the last are never made
    def last(variables: Variables, pixels: jax.Array) -> jax.Array | None:
        _, sown = module.apply(variables, pixels, train=False, mutable=["intermediates"])
        leaves = jax.tree_util.tree_leaves_with_path(sown.get("intermediates", {}))
        paths = [(jax.tree_util.keystr(k, simple=True, separator="/"), x) for k, x in leaves]
        shown = [(path, x) for path, x in paths if "attention/" in path]
        return max(shown, key=order)[1].mean((1, 2)) if shown else None

    found = last(variables, pixels)
    if found is None:
        return None
    weights = np.asarray(found)
    high = round(math.sqrt(weights.shape[1] * pixels.shape[1] / pixels.shape[2]))
    return weights.reshape(len(weights), high, -1)


def _picture(image: np.ndarray, maps: Sequence[np.ndarray], caption: str) -> Picture:
    """An image ``uint8 [h, w, c]``, and in turn where each of its maps ``[i, j]`` is."""
    drawn = [grad_cam.overlay(image, found) for found in maps]
    size = drawn[0].shape[1::-1]
    plain = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST).reshape(*size[::-1], -1)
    parts = [np.broadcast_to(plain, drawn[0].shape), *drawn]
    small = SIDE, round(SIDE * size[1] / size[0])
    parts = [cv2.resize(part, small, interpolation=cv2.INTER_AREA) for part in parts]
    gap = np.full((small[1], 4, 3), 128, np.uint8)
    row = np.hstack([part for each in parts for part in (gap, each)][1:])
    return Picture(cv2.imencode(".png", row[..., ::-1])[1].tobytes(), caption, "photo")


def translations(run: Run, config: schema.TranslationRun, translator: translate.Translator) -> None:
    """A few sentences of the first split, their translations, and what was looked at."""
    text = pairs.read(config.data, config.data.eval_splits[0])
    both = list(zip(text.sources, text.targets, strict=True))
    fitting = [pair for pair in both if WORDS[0] <= len(pair[0].split()) <= WORDS[1]]
    chosen = (fitting or both)[: SHOWN[1]]
    found = translator.translate(
        [source for source, _ in chosen],
        beam=config.task.beam or 4,
        length_penalty=config.task.length_penalty,
    )
    for (source, reference), translation in zip(chosen, found, strict=True):
        if not translation.hypotheses:
            run.notes.append(f"A sentence was not translated: {translation.problem}")
            continue
        looked = translator.attention(source, translation.hypotheses[0])
        drawn = io.BytesIO()
        looked.draw(drawn, titled=False)
        words = translator.tokenizers
        run.samples.append(
            Sample(
                words.source.plain(source),
                words.target.plain(reference),
                translation.text,
                Picture(drawn.getvalue(), looked.title),
            )
        )
