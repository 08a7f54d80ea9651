# SPDX-License-Identifier: Apache-2.0
"""What a trained model makes of its evaluation split: mistakes, translations, where it looks."""

import io
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.config import schema
from localglobal_jax.data.images import pipeline
from localglobal_jax.data.text import pairs
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference import translator as translate
from localglobal_jax.training.reporting.html.facts import Confusion, Picture, Run, Sample
from localglobal_jax.training.tasks import Variables
from localglobal_jax.training.tasks.classification import normalize

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
