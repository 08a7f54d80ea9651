# SPDX-License-Identifier: Apache-2.0
"""Pictures in, their classes out, in the same order.

    classifier = classify.load("runs/mine")             # a workdir, or a checkpoint in it
    for found in classifier.classify(["cat.jpg", "dog.png"], top=3):
        print(found.path, found.best[0].name, found.best[0].probability)

Pictures are prepared by the functions that evaluation uses, and go through the model in batches of
one shape, compiled once. Nothing is printed here, see `classify_command`.
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from localglobal_jax import convert
from localglobal_jax.config import loading, schema, validation, values
from localglobal_jax.data.images import device_ops, files, pipeline
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference import load as inference_load
from localglobal_jax.models import EncoderDecoder
from localglobal_jax.models.registry import Variables, create_model
from localglobal_jax.parallel import context

NEEDED = ("data.image_size", "data.mean", "data.std")  # to prepare pictures, if no run says how
PREPARING = (*NEEDED, "data.crop", "data.threads")


class Guess(NamedTuple):
    """A class; its name is its number where nobody has named it."""

    label: int
    name: str
    probability: float


class Classified(NamedTuple):
    """What became of a picture. No guess: `problem` says why."""

    path: str
    best: tuple[Guess, ...] = ()  # the likeliest first
    problem: str = ""
    overlay: np.ndarray | None = None  # uint8 [h, w, 3], if it was asked for


class _Prepared(NamedTuple):
    """A picture as the model sees it, and, to draw on, as people do."""

    image: np.ndarray
    shown: np.ndarray | None
    seen: tuple[float, float, float, float]  # see `grad_cam.overlay`


class _Asked(NamedTuple):
    """The arguments of `Classifier.classify`."""

    top: int
    rows: int  # of every batch
    overlay: bool
    stage: int | None


class Classifier:
    """A trained model, how its pictures are prepared, and what its classes are called.

    Position tables are resized if `options.image_size` is not that of the training. Raises
    ValueError for a module that does not classify images, or not of this size.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        options: schema.Images,
        labels: Sequence[str] = (),
    ):
        check_classifier(module)
        # The first convolution of every stem here: [height, width, channels, features].
        stem = jax.tree.leaves(variables["params"]["stem"])
        self.channels = next(leaf.shape[2] for leaf in stem if leaf.ndim == 4)
        pipeline.check_channels(options, self.channels)
        shape = (1, *options.image_size, self.channels)
        try:
            variables = convert.adapt.fit(
                module, variables, jax.ShapeDtypeStruct(shape, jnp.float32)
            )
        except (ValueError, MemoryError) as error:
            raise ValueError(f"on images of {options.image_size}: {error}") from error
        self.module, self.options = module, options
        self.labels = tuple(labels)
        self._variables = variables
        self._compute = jax.jit(self._computed, static_argnames=("overlay", "stage"))

    def _computed(
        self, variables: Variables, image: jax.Array, *, overlay: bool, stage: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Probabilities, and where the likeliest class was seen."""
        x, maps = device_ops.normalize(image, self.options), None
        if overlay:
            logits, maps = grad_cam.grad_cam(self.module, variables, x, stage)
        else:
            with context.implementation(context.chosen_implementation("fused")):
                logits, _ = self.module.apply(variables, x, train=False)
        return nn.softmax(logits), maps

    def classify(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top: int = 3,
        batch_size: int = 32,
        overlay: bool = False,
        stage: int | None = None,
    ) -> Iterator[Classified]:
        """One `Classified` per path, in their order, as they become known.

        Args:
          paths: files, ``file://`` URLs, or paths in a store (gs://, s3://); of folders, see
            `picture_files.find`.
          top: how many of the likeliest classes; all if there are fewer.
          batch_size: pictures that go through the model together.
          overlay: also draw where the model saw the likeliest class, by Grad-CAM.
          stage: whose output `overlay` shows; None: the last one's, see `grad_cam`.

        Raises ValueError for options out of their range.
        """
        if isinstance(paths, str | os.PathLike):
            raise ValueError("paths is one path: give a list")
        if min(top, batch_size) < 1:
            raise ValueError(f"top={top}, batch_size={batch_size}: at least one each")
        if stage is not None and not overlay:
            raise ValueError(f"stage={stage} is that of an overlay: ask for both")
        asked = _Asked(top, max(1, min(batch_size, len(paths))), overlay, stage)
        return self._classify([os.fspath(path) for path in paths], asked)

    def _classify(self, paths: list[str], asked: _Asked) -> Iterator[Classified]:
        batches = [paths[i : i + asked.rows] for i in range(0, len(paths), asked.rows)]
        with concurrent.futures.ThreadPoolExecutor(self.options.threads) as pool:

            def begin(number: int) -> list[concurrent.futures.Future[_Prepared | str]]:
                batch = batches[number] if number < len(batches) else []
                return [pool.submit(self._prepare, path, asked.overlay) for path in batch]

            ahead = begin(0)
            for number, batch in enumerate(batches):
                prepared = [future.result() for future in ahead]
                ahead = begin(number + 1)  # while the model works
                yield from self._answers(batch, prepared, asked)

    def _answers(
        self, paths: list[str], prepared: list[_Prepared | str], asked: _Asked
    ) -> Iterator[Classified]:
        """Of a batch; what is missing of it, or bad, are black pictures."""
        batch = np.zeros((asked.rows, *self.options.image_size, self.channels), np.uint8)
        for row, one in enumerate(prepared):
            if isinstance(one, _Prepared):
                batch[row] = one.image
        probabilities, maps = jax.device_get(
            self._compute(self._variables, batch, overlay=asked.overlay, stage=asked.stage)
        )
        for row, (path, one) in enumerate(zip(paths, prepared, strict=True)):
            if not isinstance(one, _Prepared):
                yield Classified(path, problem=one)
                continue
            drawn = None
            if one.shown is not None:
                drawn = grad_cam.overlay(one.shown, maps[row], one.seen)
            yield Classified(path, self._best(probabilities[row], asked.top), overlay=drawn)

    def _prepare(self, path: str, overlay: bool) -> _Prepared | str:
        """In a thread; a text says what is wrong."""
        try:
            picture = files.read(path, self.channels)
        except ValueError as error:
            return str(error)
        h, w = picture.shape[:2]
        top, left, height, width = pipeline.seen_in_evaluation((h, w), self.options)
        return _Prepared(
            pipeline.for_evaluation(picture, self.options),
            grad_cam.shrunk(picture) if overlay else None,
            (top / h, left / w, height / h, width / w),
        )

    def _best(self, probabilities: np.ndarray, top: int) -> tuple[Guess, ...]:
        order = np.argsort(-probabilities, kind="stable")[:top]
        return tuple(Guess(int(i), self.name(int(i)), float(probabilities[i])) for i in order)

    def name(self, index: int) -> str:
        """Of a class."""
        return self.labels[index] if index < len(self.labels) else str(index)


def check_classifier(module: nn.Module) -> None:
    """Raises ValueError for a module that does not classify images."""
    if isinstance(module, EncoderDecoder) or not getattr(module, "classes", 0):
        raise ValueError(
            f"this {type(module).__name__} does not classify images: give the workdir of a "
            "classification run (`localglobal translate` is for text)"
        )


def load(
    path: str | pathlib.Path,
    step: int | str | None = None,
    average: int = 1,
    overrides: Mapping[str, str] | None = None,
) -> Classifier:
    """Of a workdir, a checkpoint in it, or the directory that a checkpoint was converted to.

    `step` and `average`: see `evaluate.load`; as there, an average of the variables that the run
    kept is what is used. `overrides`: of how pictures are prepared (`PREPARING`), for instance
    ``{"data.image_size": "(384, 384)"}``; of converted weights nobody knows it, and `NEEDED` must
    be given. Raises ValueError where there is no such checkpoint, or it does not classify images.
    """
    _, variables, metadata = inference_load.read_variables(path, step, average)
    module = create_model(**values.tuples(metadata["model"]))
    check_classifier(module)
    overrides = overrides or {}
    for field in overrides:
        if field not in PREPARING:
            raise validation.unknown("field of how pictures are prepared:", field, PREPARING)
    missing = [f"--config.{field}" for field in NEEDED if field not in overrides]
    if missing and "config" not in metadata:
        raise ValueError(
            f"{path} was converted, and does not say how its pictures are prepared: give "
            f"{', '.join(missing)} as its authors had them. For most models of ImageNet: "
            "--config.data.image_size='(224, 224)' --config.data.mean='(0.485, 0.456, 0.406)' "
            "--config.data.std='(0.229, 0.224, 0.225)' --config.data.crop=resized"
        )
    config = ConfigDict(values.tuples(metadata.get("config") or {"model": metadata["model"]}))
    for field, text in overrides.items():
        loading.override(config, field, text)
    options = validation.check(config).data
    assert isinstance(options, schema.Images), "a run whose model classifies images has images"
    return Classifier(module, jax.device_put(variables), options, metadata.get("labels") or ())
