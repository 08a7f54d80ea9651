# SPDX-License-Identifier: Apache-2.0
"""Predictions of a checkpoint for its page: confusion matrix, attention maps, translations."""

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
from localglobal_jax.data.images.device_ops import normalize
from localglobal_jax.data.text import pairs
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference.translator import Translator
from localglobal_jax.models.registry import Variables
from localglobal_jax.parallel import context
from localglobal_jax.training.reporting.examples import spread
from localglobal_jax.training.reporting.html.facts import Confusion, Picture, Run, Sample

MOST = 10_000  # images of a confusion matrix
ROWS = 64  # per batch: the run's own batch size may be that of a pod
SHOWN = 3, 2  # images, sentences
WORDS = 4, 24  # preferred length of the sentences
SIDE = 192  # width of an image on the page, in pixels


def add_classifications(
    run: Run, config: schema.ClassificationRun, module: nn.Module, variables: Variables
) -> None:
    """Adds the confusion matrix of the first split, and attention maps of some of its images."""
    options = config.data.model_copy(update={"in_memory": False})  # some images are read, once each
    split = options.eval_splits[0]
    source = pipeline.open_split(options, split, train=False)
    known = pipeline.class_names(options)
    classes = [*known] + [str(i) for i in range(len(known), getattr(module, "classes", 0))]
    counts = np.zeros((len(classes), len(classes)), np.int64)

    @jax.jit
    def predict(variables: Variables, image: jax.Array) -> jax.Array:
        with context.implementation("fused"):  # as in training
            logits = module.apply(variables, normalize(image, options), train=False)[0]
        return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)

    chosen = spread(len(source), MOST)
    rows = min(ROWS, len(chosen))
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        batch = source.batch(np.resize(part, rows), None)  # one shape, compiled once
        predicted = np.asarray(predict(variables, jnp.asarray(batch["image"])))
        real = (batch["mask"] > 0) & (np.arange(rows) < len(part))
        if (predicted[real] < 0).any():
            raise ValueError("the outputs of this checkpoint are NaN or infinite")
        np.add.at(counts, (batch["label"][real], predicted[real]), 1)
    whole = f" of {len(source):,}, evenly spread" if len(source) > MOST else ""
    run.confusion = Confusion(split, f"{counts.sum():,} images{whole}", classes, counts)

    shown = source.batch(chosen[:: math.ceil(len(chosen) / SHOWN[0])], None)
    pixels = normalize(jnp.asarray(shown["image"]), options)
    logits, seen = jax.jit(partial(grad_cam.grad_cam, module))(variables, pixels)
    attended = attention_map(module, variables, pixels)
    for i in np.flatnonzero(shown["mask"]):
        maps = [np.asarray(found[i]) for found in (attended, seen) if found is not None]
        caption = f"{classes[shown['label'][i]]}, taken for {classes[int(logits[i].argmax())]}"
        run.looks.append(_picture(shown["image"][i], maps, caption))


def attention_map(module: nn.Module, variables: Variables, pixels: jax.Array) -> np.ndarray | None:
    """Returns the attention that each position receives, ``[b, h, w]``, in the last global layer.

    The mean over heads and queries, which sums to 1. None if the model has no global attention.
    """

    def order(found: tuple[str, Any]) -> list[Any]:  # block10 after block9
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", found[0])]

    @jax.jit  # XLA then drops the weights of all but the last layer
    def last(variables: Variables, pixels: jax.Array) -> jax.Array | None:
        with context.implementation("fused"):  # as in training
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
    """Draws an image, ``uint8 [h, w, c]``, with each of its maps ``[i, j]`` beside it."""
    drawn = [grad_cam.overlay(image, found) for found in maps]
    size = drawn[0].shape[1::-1]
    plain = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST).reshape(*size[::-1], -1)
    parts = [np.broadcast_to(plain, drawn[0].shape), *drawn]
    small = SIDE, round(SIDE * size[1] / size[0])
    parts = [cv2.resize(part, small, interpolation=cv2.INTER_AREA) for part in parts]
    gap = np.full((small[1], 4, 3), 128, np.uint8)
    row = np.hstack([part for each in parts for part in (gap, each)][1:])
    return Picture(cv2.imencode(".png", row[..., ::-1])[1].tobytes(), caption, "photo")


def add_translations(run: Run, config: schema.TranslationRun, translator: Translator) -> None:
    """Adds translations of a few sentences of the first split, with their cross-attention."""
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
        attention = translator.attention(source, translation.hypotheses[0])
        drawn = io.BytesIO()
        attention.draw(drawn, titled=False)
        vocabularies = translator.tokenizers
        run.samples.append(
            Sample(
                vocabularies.source.plain(source),
                vocabularies.target.plain(reference),
                translation.text,
                Picture(drawn.getvalue(), attention.title),
            )
        )
