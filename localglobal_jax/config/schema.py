# SPDX-License-Identifier: Apache-2.0
"""Schema of a run: every option with its type, default, bounds and unit.

A config file (``configs/*.py``) builds an `ml_collections.ConfigDict`; `validation.check` returns
it as the frozen `Run` below or raises an error that names the wrong fields. This module imports no
jax, so that a launcher can check a thousand configs in a second. Only the ``model`` section is not
listed: its keys are the fields of the module that its ``name`` builds, and `models.create_model`
checks them.
"""

import os
import warnings
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WrapValidator,
)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
# The upper bounds are far beyond any use: they stop a typing error from taking all memory.
Side = Annotated[int, Field(gt=0, le=16384)]  # pixels
Threads = Annotated[int, Field(gt=0, le=1024)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Alpha = Annotated[float, Field(ge=0, le=1000)]  # of a Beta distribution
Weight = Annotated[float, Field(gt=0, le=1e6)]  # of a class


def _number(value: Any) -> Any:
    """Returns the number that a text spells; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _square(value: Any) -> Any:
    """Returns both sides for one; any other value as it is."""
    one = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return (one, one) if type(one) is int else value


Crop = Annotated[float, Field(ge=0.1, le=2)] | Literal["squash"]


def _crop(given: Any, check: pydantic.ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(_number(given))
    except pydantic.ValidationError:  # one line instead of one for every alternative
        raise ValueError('give a number from 0.1 to 2, or "squash"') from None


Tag = Annotated[str, Field(min_length=1, max_length=64)]  # as long as wandb allows


def _text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


# "~/x" is in the home directory
Path = Annotated[str, BeforeValidator(_text), AfterValidator(os.path.expanduser)]


class Section(pydantic.BaseModel):
    """Base of the sections: unknown names, wrong types and values out of bounds are errors."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Images(Section):
    """Image data set, decoding and augmentation. The order is a function of (seed, position)."""

    # TFDS name: digits, fashion_mnist, cifar10, imagenet2012, ...; or "folder": `dir` holds one
    # folder of pictures per class (see `data/images/folder.py`)
    name: str = "digits"
    # TFDS data directory, local or gs://BUCKET/PATH; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    dir: Path | None = None
    # Of "folder": `dir` holds a folder per class (classes), or train, validation and test that hold
    # them (splits); auto: by the names of the folders, an error where these leave it open
    layout: Literal["auto", "classes", "splits"] = "auto"
    # Resume although the training records are not those of the checkpoint (renamed, replaced, more,
    # fewer): later batches are of the new ones
    accept_changes: bool = False
    mock: bool = False  # synthetic images of the right shape and number of classes, no data needed
    train_split: str = "train"  # TFDS split: "train", "train[:90%]", "train+validation", ...
    eval_splits: tuple[str, ...] = ("test",)  # evaluated one after the other
    # Input of the model: (height, width), pixels; one number is a square
    image_size: Annotated[tuple[Side, Side], BeforeValidator(_square)] = (8, 8)
    mean: tuple[float, ...] = (0.5,)  # subtracted, per channel; pixels are in [0, 1]
    std: tuple[Annotated[float, Field(ge=1e-6)], ...] = (0.5,)  # divisor, per channel
    # 1: pictures become grey; 3: grey ones get three equal channels; None: as the data set has them
    channels: Literal[1, 3] | None = None
    # Pictures of folders, and those to classify, are turned upright by their EXIF orientation. TFDS
    # sets are used as stored. None: as False, in a run that began before this option existed
    exif_orientation: bool | None = True
    in_memory: bool | None = None  # decode once, keep as uint8; None: if that takes less than 2 GiB
    # Training crop. "resized": Inception's, a random area with an aspect ratio of 3/4 to 4/3, which
    # is stretched to `image_size`. "pad": random shift of the image that evaluation sees. "none":
    # that image.
    crop: Literal["none", "pad", "resized"] = "none"
    # Part of an image that evaluation sees. A number: the central crop in the aspect of
    # `image_size`, its sides so much of the largest one's; above 1: a black border (timm's
    # crop_pct).
    # "squash": the whole image, in the aspect of `image_size`. None: 0.875 if `crop` is "resized",
    # else "squash"
    eval_crop: Annotated[Crop | None, WrapValidator(_crop)] = None
    # How images are resized. "area": averages along a side that shrinks, cubic along one that
    # grows (OpenCV); "bilinear", "bicubic": those of Pillow, as torchvision and timm resize
    interpolation: Literal["area", "bilinear", "bicubic"] = "area"
    pad: Annotated[int, Field(ge=0, le=16384)] = 0  # zero padding of a "pad" crop, pixels a side
    area: tuple[Share, Share] = (0.08, 1.0)  # (smallest, largest) of a "resized" crop; 1: the image
    flip: bool = False  # left to right, with probability 0.5
    # Operations per image (RandAugment, arXiv 1909.13719); 0: off
    randaugment_layers: Annotated[int, Field(ge=0, le=100)] = 0
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 15  # strength of each operation
    # Operations, and what a magnitude means to them: see `data/images/randaugment.py`
    randaugment_scale: Literal["own", "timm", "tf"] = "own"
    randaugment_probability: Share = 1.0  # of each operation to be applied
    randaugment_noise: Annotated[float, Field(ge=0, le=30)] = 0.0  # deviation of the magnitude
    erase: Fraction = 0.0  # probability of erasing a random rectangle (arXiv 1708.04896)
    # Factors of the classes' images in the training loss: "none"; "balanced" (n / (classes * images
    # of the class)); your own, one per class in their order, or by name or number (others: 1).
    # Evaluations stay unweighted, and also report the mean recall of the classes
    class_weights: Literal["none", "balanced"] | dict[str, Weight] | tuple[Weight, ...] = "none"
    # Folder of label maps for token labelling: CLASS/STEM.npy or .pt of each image, cropped and
    # flipped with it (see `data/images/label_maps.py`); needs crop="resized" and a VOLO
    label_maps: Path | None = None
    max_bad_records: NonNegativeInt = 0  # records that may fail to decode; they are masked
    threads: Threads = 4  # decoding threads of one host, or of each worker
    # Processes of one host that make batches, two ahead each, for images that are decoded anew for
    # every batch (see `data/workers.py`); 0: only threads, which share the interpreter's lock
    workers: Workers = 0

    @pydantic.field_validator("class_weights", mode="wrap")
    @classmethod
    def _weights(cls, given: Any, check: pydantic.ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(given)
        except pydantic.ValidationError:  # one line instead of one for every alternative
            raise ValueError(
                'give "none", "balanced", weights above 0 by name, such as {"cat": 2.0}, or by '
                'number as text, {"3": 2.0}, or one for each class'
            ) from None

    @pydantic.field_validator("area")
    @classmethod
    def _ordered(cls, area: tuple[float, float]) -> tuple[float, float]:
        if area[0] > area[1]:
            raise ValueError("give (smallest, largest)")
        return area


class Text(Section):
    """Sentence pairs, tokenizer and batches of token ids.

    ``batch_size`` counts tokens of the longer side, padding included: a batch of length bucket L
    holds ``batch_size // L`` pairs, rounded down to a multiple of ``rows_multiple``.
    """

    name: str = "lohelp_translate/en-de"  # TFDS name: wmt14_translate/de-en, opus, ...
    # TFDS data directory, local or gs://BUCKET/PATH; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    dir: Path | None = None
    # Your own text instead (the name is then "text_pairs"): (SOURCE, TARGET), line i of one the
    # translation of line i of the other, or one .tsv of "source TAB target". With "{split}" in the
    # names each split has its own files, otherwise a hash of the source chooses the split (see
    # `data/text/files.py`).
    files: Annotated[tuple[Path, ...], Field(max_length=2)] = ()
    accept_changes: bool = False  # resume although the training pairs are not the checkpoint's
    mock: bool = False  # synthetic language, no data needed
    source: str | None = None  # language (TFDS feature) to translate from; None: the data set's
    target: str | None = None  # language to translate into; None: the data set's, or the file's
    train_split: str = "train"
    eval_splits: tuple[str, ...] = ("validation",)  # evaluated one after the other
    # "bpe", "unigram": SentencePiece, trained on the training split and kept in the workdir.
    # "dict": fairseq's dictionaries, for text that is already split into subwords.
    tokenizer: Literal["bpe", "unigram", "dict"] = "bpe"
    vocab: Annotated[int, Field(ge=8, le=1_000_000)] = 8000  # ids, including four special ones
    joint: bool = True  # one vocabulary for both languages
    dicts: Annotated[tuple[Path, ...], Field(max_length=2)] = ()  # dict.txt of source and target
    max_length: Annotated[int, Field(ge=2)] = 256  # tokens; training leaves out longer pairs
    buckets: PositiveInt = 6  # number of padded lengths; the step is compiled once for each
    # Pairs of a batch are a multiple of it: batches are then the same on any number of devices
    rows_multiple: PositiveInt = 8
    max_bad_records: NonNegativeInt = 0  # records that may be unreadable; they are left out
    threads: Threads = 2  # batches that one host prepares at a time
    workers: Workers = 0  # processes of one host that make batches instead; text rarely needs them

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_of_files(cls, given: Any) -> Any:
        own = isinstance(given, dict) and given.get("files")
        return {**given, "name": "text_pairs"} if own else given

    @pydantic.model_validator(mode="after")
    def _dictionaries(self) -> Self:
        if self.mock and self.files:
            raise ValueError("mock=True needs no files: leave files=() or set mock=False")
        if (self.tokenizer == "dict") != bool(self.dicts) and not self.mock:
            raise ValueError(
                'tokenizer="dict" and dicts=(FILE,) or (SOURCE_FILE, TARGET_FILE) need each other'
            )
        return self


class Classification(Section):
    """Classification of images: loss and mixing of images."""

    name: Literal["classification"] = "classification"
    # softmax: cross-entropy; sigmoid: binary cross-entropy of every class, summed over the classes
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Fraction = 0.0  # probability mass spread over all classes
    mixup: Alpha = 0.0  # alpha of Beta(alpha, alpha) (arXiv 1710.09412); 0: off
    # alpha of Beta(alpha, alpha) (arXiv 1905.04899); 0: off. With mixup on too, each batch uses one
    cutmix: Alpha = 0.0
    token_weight: NonNegativeFloat = 0.5  # factor of the token loss, if the model has token logits


class Translation(Section):
    """Translation of sentences: loss and beam search of evaluations."""

    name: Literal["translation"] = "translation"
    label_smoothing: Fraction = 0.1  # probability mass spread over the vocabulary
    # Hypotheses per sentence: evaluations translate every split and score it; 0: only the loss
    beam: Annotated[int, Field(ge=0, le=1024)] = 4
    length_penalty: Annotated[float, Field(ge=0, le=10)] = 1.0  # exponent; 0: none
    # sacreBLEU's tokenizer. "auto": zh, ja-mecab, ko-mecab or char for target languages without
    # blanks between words (data.target, the end of the file's name, or the text), else 13a
    bleu_tokenizer: Literal[
        "auto",
        "13a",
        "intl",
        "zh",
        "ja-mecab",
        "ko-mecab",
        "char",
        "flores101",
        "flores200",
        "none",
    ] = "auto"


class Optim(Section):
    """Optimizer, schedule and averaging. Weight decay spares biases, norms and tables."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3  # after the warm-up
    # After the warm-up; rsqrt: peak * sqrt(warmup / step)
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    warmup_steps: NonNegativeInt = 0  # linear
    init_learning_rate: NonNegativeFloat = 0.0  # at the first step of the warm-up
    end_learning_rate: NonNegativeFloat = 0.0  # after the last step of "cosine" and "linear"
    b1: Fraction = 0.9  # adamw: decay of the mean of the gradient, per step
    b2: Fraction = 0.999  # adamw: decay of the mean of its square, per step
    eps: PositiveFloat = 1e-8  # adamw: added to the square root
    momentum: Fraction = 0.9  # sgd
    weight_decay: NonNegativeFloat = 0.0  # decoupled, multiplied by the learning rate
    clip_norm: NonNegativeFloat = 1.0  # largest global norm of the gradient; 0: off
    # Globs of paths in the table of parameters: those are not trained, see `training/freezing.py`.
    # "stem" and "stage[12]" name modules; "!" exempts: ("*", "!head") is a linear probe
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    # Rate of a block relative to that of the next one: the head has learning_rate, the stem the
    # lowest rate (arXiv 2106.08254, table 9); 1: one rate for all. See `optim.layer_rates`
    layer_decay: Share = 1.0
    ema: Fraction = 0.0  # decay per step of the parameters' average that evaluation uses; 0: off
    accumulate: PositiveInt = 1  # micro-batches per step; the gradient is that of the whole batch
    skip_nonfinite: NonNegativeInt = 0  # NaN or infinite updates that a run may skip

    @pydantic.field_validator("freeze", mode="before")
    @classmethod
    def _one_pattern(cls, given: Any) -> Any:
        return tuple(filter(None, given.split(","))) if isinstance(given, str) else given


class Checkpoints(Section):
    """Saving and retention of checkpoints. Saving is asynchronous."""

    every: NonNegativeInt = 500  # steps; 0: only at the end
    keep: PositiveInt = 2  # number of newest checkpoints
    keep_every: NonNegativeInt = 0  # also keep each multiple of so many steps; 0: off
    # Also keep the best checkpoint by this metric, e.g. "test/accuracy" or "-test/loss", among the
    # steps that are both evaluated and saved. "-": smaller is better (loss, nll, perplexity)
    best: str | None = None

    @pydantic.field_validator("best")
    @classmethod
    def _best_of_evaluation(cls, best: str | None) -> str | None:
        return best and evaluated_metric(best)


class Evaluation(Section):
    """Evaluation during training; it always runs at the end, too."""

    every: NonNegativeInt = 500  # steps; 0: only at the end
    # Global; text: tokens. Much longer pairs than data.max_length need more of them, and are left
    # out (and counted) if a batch cannot hold them. None: the training batch size
    batch_size: PositiveInt | None = None
    # Stop after so many evaluations in a row without a better value of checkpoint.best; 0: never
    patience: NonNegativeInt = 0


class Log(Section):
    """Metrics, examples and traces that a run writes."""

    every: PositiveInt = 50  # steps between two lines of metrics
    tensorboard: bool = True  # event files in the workdir
    # Examples, evenly spread, that every evaluation shows in TensorBoard and wandb (one host only)
    samples: Annotated[int, Field(ge=0, le=64)] = 0
    wandb: str | None = None  # name of the project; needs the extra [wandb]
    profile: tuple[NonNegativeInt, PositiveInt] | None = None  # traced: (first step, steps)
    # Words and a sentence of yours, shown in TensorBoard, wandb, reports and tables of sweeps
    tags: Annotated[tuple[Tag, ...], Field(max_length=100)] = ()
    note: Annotated[str, Field(max_length=10_000)] = ""

    @pydantic.field_validator("tags", mode="before")
    @classmethod
    def _words(cls, tags: Any) -> Any:
        """Takes numbers, which a command line reads in ``--config.log.tags=2026,1``, as words."""
        if not isinstance(tags, list | tuple):
            return tags
        return tuple(str(tag) if type(tag) in (int, float) else tag for tag in tags)


class Parallel(Section):
    """Distribution of the step over devices (see `parallel/placement.py`)."""

    mesh: dict[str, int] = {"data": -1}  # axis -> devices; -1: all others
    # Sharded besides the batch: nothing (replicate); parameters and optimizer over the axis "fsdp"
    # (fsdp); heads and hidden channels over the axis "model" (tensor); or both.
    strategy: Literal["replicate", "fsdp", "tensor", "fsdp+tensor"] = "replicate"
    compile: Literal["jit", "pmap"] = "jit"  # pmap: one program per device, all replicated
    # blocks: the backward pass recomputes the activations of blocks: less memory, more time
    remat: Literal["none", "blocks"] = "none"
    scan: bool = False  # compile equal consecutive blocks once: faster to compile; best with remat
    # reference: the equations, differentiated by JAX; fused: the same numbers, fewer bytes
    implementation: Literal["fused", "reference"] = "fused"
    # The former name of `implementation`: "tuned" is "fused", "plain" is "reference".
    formulation: Annotated[Literal["tuned", "plain"] | None, Field(exclude=True)] = None
    # Statistics of the global batch or, under pmap, of the part on each device
    batch_norm: Literal["global", "per_device"] = "global"
    # Folder of compiled programs, for a faster start the next time. "auto":
    # ~/.cache/localglobal/xla, but none on CPU; None: none
    compilation_cache: Path | None = "auto"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _former_name(cls, given: Any) -> Any:
        """Reads `formulation`, which every config.json of version 0.1 has, as `implementation`."""
        if not isinstance(given, dict) or given.get("formulation") not in ("tuned", "plain"):
            return given
        given = dict(given)
        former = given.pop("formulation")
        if former != "tuned":  # the default, which nobody needs to change
            warnings.warn(
                "config.parallel.formulation is deprecated: write "
                "config.parallel.implementation=reference instead of formulation=plain",
                DeprecationWarning,
                stacklevel=2,
            )
        return {"implementation": {"tuned": "fused", "plain": "reference"}[former], **given}

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        for strategy, axis in (("fsdp", "fsdp"), ("tensor", "model")):
            if strategy in self.strategy.split("+") and axis not in self.mesh:
                raise ValueError(
                    f'strategy={self.strategy} needs an axis "{axis}" in parallel.mesh, not '
                    f'{self.mesh}: for example {{"data": -1, "{axis}": 2}}'
                )
        if self.compile == "pmap" and (self.strategy != "replicate" or len(self.mesh) > 1):
            raise ValueError(
                f"compile=pmap replicates: it needs strategy=replicate, not {self.strategy}, and "
                f'no axis but "data" in parallel.mesh, not {self.mesh}'
            )
        if self.compile != "pmap" and self.batch_norm == "per_device":
            raise ValueError(
                "batch_norm=per_device needs compile=pmap: under jit a batch is one array, and so "
                "are its statistics"
            )
        return self


class Run(Section):
    """A run. ``task.name`` chooses its class among `RUNS`, and thereby the type of ``data``."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # from 2**32 on, jax.random.key repeats
    steps: Annotated[int, Field(gt=0, lt=2**31)] = 1000  # optimizer updates
    batch_size: PositiveInt = 128  # images, or tokens of text, over all hosts and devices
    dtype: Literal["float32", "bfloat16"] = "float32"  # activations; parameters stay float32
    model: dict[str, Any]  # {"name": ..., **fields of the module}
    init: Path | None = None  # workdir or checkpoint that step 0 starts from; not read later
    task: Classification | Translation
    data: Images | Text
    optim: Optim = Optim()
    checkpoint: Checkpoints = Checkpoints()
    eval: Evaluation = Evaluation()
    log: Log = Log()
    parallel: Parallel = Parallel()

    @pydantic.field_validator("model")
    @classmethod
    def _named(cls, model: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(model.get("name"), str):
            raise ValueError("set model.name to the name of a model, see `localglobal models`")
        return model

    @pydantic.field_validator("eval")
    @classmethod
    def _patient(cls, given: Evaluation, info: pydantic.ValidationInfo) -> Evaluation:
        saved = info.data.get("checkpoint")
        if given.patience and saved and not (saved.best and given.every):
            raise ValueError(
                f"patience={given.patience} needs a metric in checkpoint.best, such as "
                f'"test/accuracy" or "-test/loss", and eval.every above 0; given are '
                f"checkpoint.best={saved.best} and eval.every={given.every}"
            )
        return given

    @property
    def train_rows(self) -> tuple[str, int]:
        """Name and value of the field that the rows of a training batch are a multiple of."""
        return "batch_size", self.batch_size

    @property
    def eval_rows(self) -> tuple[str, int]:
        """Name and value of the field that the rows of an evaluation batch are a multiple of."""
        return "eval.batch_size", self.eval.batch_size or self.batch_size


class ClassificationRun(Run):
    """A run on images and labels: the default if ``task.name`` is not set."""

    task: Classification = Classification()
    data: Images = Images()


class TranslationRun(Run):
    """A run on pairs of sentences."""

    task: Translation
    data: Text = Text()

    @property
    def train_rows(self) -> tuple[str, int]:
        return "data.rows_multiple", self.data.rows_multiple

    eval_rows = train_rows


RUNS: dict[str, type[Run]] = {"classification": ClassificationRun, "translation": TranslationRun}


def evaluation_name(split: str) -> str:
    """Returns the name of a split in metrics: "train_eval" for "train", which training has."""
    return "train_eval" if split == "train" else split


def evaluated_metric(metric: str) -> str:
    """Returns a metric of an evaluation ("test/loss", "-train/loss") under its split's name."""
    sign, rest = ("-", metric[1:]) if metric.startswith("-") else ("", metric)
    split, slash, name = rest.rpartition("/")
    return f"{sign}{evaluation_name(split)}{slash}{name}"


# Fields that may differ between a run and its resumption. They do not change the computation,
# except for the order of sums over devices and the treatment of unreadable records.
MAY_CHANGE = (
    *("checkpoint", "eval", "log"),
    *(
        f"parallel.{field}"
        for field in Parallel.model_fields
        if field not in ("batch_norm", "formulation")
    ),
    "optim.skip_nonfinite",
    "optim.accumulate",  # BatchNorm has the statistics of a part
    *("data.dir", "data.in_memory", "data.max_bad_records", "data.threads", "data.workers"),
    # data may move: checksums guard the records
    *("data.files", "data.dicts", "data.layout", "data.accept_changes"),
)
