# SPDX-License-Identifier: Apache-2.0
"""Image classification with a trained model: files in, class probabilities out, in order.

    classifier = lg.load_classifier("runs/mine")        # a workdir, or a checkpoint in it
    for found in classifier.classify(["cat.jpg", "dog.png"], top=3):
        print(found.path, found.best[0].name, found.best[0].probability)

The preprocessing is that of evaluation. All batches have one shape, so the model is compiled once.
Nothing is printed here, see `cli.classify`.
"""

import concurrent.futures
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from localglobal_jax import convert
from localglobal_jax.config import loading, migrations, preprocessing, schema, validation, values
from localglobal_jax.data.images import device_ops, files, pipeline
from localglobal_jax.inference import grad_cam
from localglobal_jax.inference import load as inference_load
from localglobal_jax.models import EncoderDecoder
from localglobal_jax.models.registry import Variables, create_model, image_channels
from localglobal_jax.parallel import context

NEEDED = ("data.image_size", "data.mean", "data.std")  # of weights whose preprocessing is unknown
PREPARING = (
    *(f"data.{field}" for field in preprocessing.FIELDS),
    *("data.crop", "data.exif_orientation", "data.threads"),
)


class Guess(NamedTuple):
    """A class and its probability. `name` is the number of the class where there are no names."""

    label: int
    name: str
    probability: float


class Classified(NamedTuple):
    """The result of one file. If it cannot be read, `best` is empty; `problem` has the reason."""

    path: str
    best: tuple[Guess, ...] = ()  # the likeliest first
    problem: str = ""
    overlay: np.ndarray | None = None  # uint8 [h, w, 3], with ``overlay=True``


class _Prepared(NamedTuple):
    """An image as the model receives it, and the original to draw the overlay on."""

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
    """A trained model: `module`, `variables`, preprocessing (`options`), class names (`labels`).

    `loss`: that of the training (`schema.Classification`). After "sigmoid" the probability of each
    class is its own, and they do not add up to 1.

    Position tables are resized if `options.image_size` differs from that of the training. Raises
    ValueError for a module that does not classify images, or cannot take this image size.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        options: schema.Images,
        labels: Sequence[str] = (),
        loss: Literal["softmax", "sigmoid"] = "softmax",
    ):
        check_classifier(module)
        self._probabilities = {"softmax": nn.softmax, "sigmoid": nn.sigmoid}[loss]
        self.channels = image_channels(variables)
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
        self.variables = variables
        self._compute = jax.jit(self._computed, static_argnames=("overlay", "stage"))

    def _computed(
        self, variables: Variables, image: jax.Array, *, overlay: bool, stage: int | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the probabilities and, with `overlay`, the map of the likeliest class."""
        x, maps = device_ops.normalize(image, self.options), None
        if overlay:
            logits, maps = grad_cam.grad_cam(self.module, variables, x, stage)
        else:
            with context.implementation(context.chosen_implementation("fused")):
                logits, _ = self.module.apply(variables, x, train=False)
        return self._probabilities(logits), maps

    def classify(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top: int = 3,
        batch_size: int = 32,
        overlay: bool = False,
        stage: int | None = None,
    ) -> Iterator[Classified]:
        """Yields one `Classified` per path, in the order of `paths`, batch by batch.

        Args:
          paths: files, ``file://`` URLs, or objects in a store (gs://, s3://). The files of a
            folder: `data.images.files.find`.
          top: number of the likeliest classes to return; all if there are fewer.
          batch_size: images per batch.
          overlay: also draw the Grad-CAM map of the likeliest class.
          stage: the stage whose output `overlay` shows; None: the last one, see `grad_cam`.

        Raises ValueError for options out of range.
        """
        if isinstance(paths, str | os.PathLike):
            raise ValueError(f"paths={paths!r} is one path: give a list, [{paths!r}]")
        if min(top, batch_size) < 1:
            raise ValueError(f"top={top}, batch_size={batch_size}: give at least 1 for each")
        if stage is not None and not overlay:
            raise ValueError(f"stage={stage} is used by overlays only: give overlay=True too")
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
                ahead = begin(number + 1)  # while the model runs
                yield from self._answers(batch, prepared, asked)

    def _answers(
        self, paths: list[str], prepared: list[_Prepared | str], asked: _Asked
    ) -> Iterator[Classified]:
        """Yields the results of one batch. Rows without a readable image are black."""
        batch = np.zeros((asked.rows, *self.options.image_size, self.channels), np.uint8)
        for row, one in enumerate(prepared):
            if isinstance(one, _Prepared):
                batch[row] = one.image
        probabilities, maps = jax.device_get(
            self._compute(self.variables, batch, overlay=asked.overlay, stage=asked.stage)
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
        """Reads and preprocesses one file, in a thread. Returns a message if it cannot be read."""
        try:
            picture = files.read(path, self.channels, upright=bool(self.options.exif_orientation))
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
        """Returns the name of class `index`."""
        return self.labels[index] if index < len(self.labels) else str(index)


def check_classifier(module: nn.Module) -> None:
    """Raises ValueError for a module that does not classify images."""
    if isinstance(module, EncoderDecoder) or not getattr(module, "classes", 0):
        raise ValueError(
            f"this {type(module).__name__} does not classify images: give the workdir of a "
            "classification run (`localglobal translate` is for text)"
        )


def load(
    path: str | os.PathLike[str],
    step: int | str | None = None,
    average: int = 1,
    overrides: Mapping[str, str] | None = None,
) -> Classifier:
    """Loads a classifier from a workdir, a checkpoint in it, or a converted checkpoint.

    Args:
      path: the workdir, the checkpoint, or the directory that `localglobal convert` wrote.
      step, average: see `inference.load.load`.
      overrides: fields of the preprocessing (`PREPARING`) as text, for instance
        ``{"data.image_size": "(384, 384)"}``, in place of those of the checkpoint. `NEEDED` must be
        given for weights that were converted without a preprocessing.

    Raises ValueError if there is no such checkpoint, or it does not classify images.

    >>> classifier = lg.load_classifier("runs/digits")
    >>> classifier.options.image_size, classifier.channels
    ((8, 8), 1)
    >>> [found.problem for found in classifier.classify(["missing.png"])]
    ['No such file or directory']
    """
    _, variables, metadata = inference_load.read_variables(path, step, average)
    return of_checkpoint(path, variables, metadata, overrides)


def of_checkpoint(
    path: str | os.PathLike[str],
    variables: Variables,
    metadata: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
) -> Classifier:
    """Makes the classifier of variables and metadata that were read at `path`; see `load`."""
    module = create_model(**values.tuples(metadata["model"]))
    check_classifier(module)
    overrides = overrides or {}
    for field in overrides:
        if field not in PREPARING:
            raise validation.unknown("field of the preprocessing:", field, PREPARING)
    found = preprocessing.of_checkpoint(metadata)
    missing = [f for f in NEEDED if f not in overrides and f.removeprefix("data.") not in found]
    if missing:
        raise ValueError(
            f"{path} has no preprocessing of images beside its weights: give "
            f"{', '.join(f'--config.{field}' for field in missing)}, the values of its authors. "
            "Examples: of timm's CoAtNets "
            f"{preprocessing.shown(preprocessing.of_timm('coatnet_0_rw_224'))}; of timm's VOLOs "
            f"{preprocessing.shown(preprocessing.of_timm('volo_d1_224'))}"
        )
    saved = metadata.get("config")
    config = ConfigDict(
        values.tuples(migrations.migrate(saved) if saved else {"model": metadata["model"]})
    )
    if "config" not in metadata:
        config.data = ConfigDict(found)
    for field, text in overrides.items():
        loading.override(config, field, text)
    options = validation.check(config).data
    assert isinstance(options, schema.Images), (
        "the data of a classification run is of the class Images"
    )
    labels, task = metadata.get("labels") or (), (saved or {}).get("task") or {}
    classifier = Classifier(
        module, jax.device_put(variables), options, labels, task.get("loss", "softmax")
    )
    if "mean" in found:
        source = f"{path} was trained with"
        inference_load.note_preprocessing(options, found, source, ("mean", "std"))
    return classifier
