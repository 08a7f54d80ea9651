# SPDX-License-Identifier: Apache-2.0
"""Every option of a run, with its type, its bounds and its reason, on one page.

A config file (``configs/*.py``) builds an `ml_collections.ConfigDict`; `configlib.check` turns it
into the frozen `Run` below or says which field is wrong. This file imports no jax, so that a
launcher can check a thousand configs in a second. The ``model`` section is the one exception: its
keys are the fields of the module that its ``name`` builds, and `models.create_model` checks them.
"""

import warnings
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
# Upper bounds are far beyond any use: they keep a slip of the finger from taking all memory.
Side = Annotated[int, Field(gt=0, le=16384)]  # pixels
Threads = Annotated[int, Field(gt=0, le=1024)]
Alpha = Annotated[float, Field(ge=0, le=1000)]  # of a Beta distribution


class Section(pydantic.BaseModel):
    """A group of options: unknown names, wrong types and wrong signs are errors."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Images(Section):
    """Where images come from and what is done to them on the host. Order is f(seed, position)."""

    # A TFDS name: digits, fashion_mnist, cifar10, imagenet2012, ...; or "folder": `dir` holds a
    # folder of pictures per class (see `data/folder.py`)
    name: str = "digits"
    dir: str | None = None  # TFDS data directory; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    mock: bool = False  # synthetic images of the right shape and number of classes, no data needed
    train_split: str = "train"
    eval_splits: tuple[str, ...] = ("test",)
    image_size: tuple[Side, Side] = (8, 8)  # (height, width) the model sees
    mean: tuple[float, ...] = (0.5,)  # per channel, of pixels in [0, 1]
    std: tuple[Annotated[float, Field(ge=1e-6)], ...] = (0.5,)
    in_memory: bool | None = None  # decode once, keep as uint8; None: if it takes below 2 GiB
    # Training crop. "resized" is Inception's; evaluation then sees the middle 7/8, else everything.
    crop: Literal["none", "pad", "resized"] = "none"
    # Pixels of zero padding around the image before a "pad" crop
    pad: Annotated[int, Field(ge=0, le=16384)] = 0
    area: tuple[Share, Share] = (0.08, 1.0)  # of a "resized" crop, as a share of the image
    flip: bool = False  # random left-right flips
    randaugment_layers: Annotated[int, Field(ge=0, le=100)] = 0  # 0: off (arXiv 1909.13719)
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 15
    erase: Fraction = 0.0  # probability of erasing a random rectangle (arXiv 1708.04896)
    max_bad_records: NonNegativeInt = 0  # skip (mask) up to this many undecodable records
    threads: Threads = 4  # decoding threads of one host

    @pydantic.field_validator("area")
    @classmethod
    def _ordered(cls, area: tuple[float, float]) -> tuple[float, float]:
        if area[0] > area[1]:
            raise ValueError("give (smallest, largest)")
        return area


class Text(Section):
    """Where pairs of sentences come from and how they become batches of token ids.

    ``batch_size`` counts tokens of the longer side, padding included: a batch of the length bucket
    L holds ``batch_size // L`` pairs, rounded down to a multiple of ``rows_multiple``.
    """

    name: str = "lohelp_translate/en-de"  # a TFDS name: wmt14_translate/de-en, opus, ...
    dir: str | None = None  # TFDS data directory; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    # Text of your own instead (the name is then "text_pairs"): two files, line i of one translating
    # line i of the other, or one .tsv of "source TAB target". With "{split}" in their names each
    # split has its own, else a pair's split is a function of its source (see `data/text_files.py`).
    files: Annotated[tuple[str, ...], Field(max_length=2)] = ()
    mock: bool = False  # a made-up language, no data needed
    source: str | None = None  # language (TFDS feature) to translate from; None: as the set says
    target: str | None = None
    train_split: str = "train"
    eval_splits: tuple[str, ...] = ("validation",)
    # Trained on the training split and kept in the workdir; "dict": text that is split into
    # subwords already, with fairseq's dictionaries
    tokenizer: Literal["bpe", "unigram", "dict"] = "bpe"
    vocab: Annotated[int, Field(ge=8, le=1_000_000)] = 8000  # ids, four special ones included
    joint: bool = True  # one vocabulary for both languages
    dicts: Annotated[tuple[str, ...], Field(max_length=2)] = ()  # dict.txt of source and target
    max_length: Annotated[int, Field(ge=2)] = 256  # training leaves out pairs with more tokens
    buckets: PositiveInt = 6  # lengths that batches are padded to; each is compiled once
    rows_multiple: PositiveInt = 8  # so that batches are the same on any number of devices
    max_bad_records: NonNegativeInt = 0  # leave out up to this many unreadable records
    threads: Threads = 2  # batches made at a time by one host

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_of_files(cls, given: Any) -> Any:
        own = isinstance(given, dict) and given.get("files")
        return {**given, "name": "text_pairs"} if own else given

    @pydantic.model_validator(mode="after")
    def _dictionaries(self) -> Self:
        if self.mock and self.files:
            raise ValueError("mock=True makes its text up: it takes no files")
        if (self.tokenizer == "dict") != bool(self.dicts) and not self.mock:
            raise ValueError(
                'tokenizer="dict" and dicts=(FILE,) or (SOURCE_FILE, TARGET_FILE) need each other'
            )
        return self


class Classification(Section):
    """What a batch means: images and labels."""

    name: Literal["classification"] = "classification"
    label_smoothing: Fraction = 0.0
    mixup: Alpha = 0.0  # alpha of Beta(alpha, alpha); 0: off (arXiv 1710.09412)
    cutmix: Alpha = 0.0  # alpha; with both on, each batch takes one of them
    token_weight: NonNegativeFloat = 0.5  # of the loss of all tokens, if the model has their logits


class Translation(Section):
    """What a batch means: sentences and their translations."""

    name: Literal["translation"] = "translation"
    label_smoothing: Fraction = 0.1
    # Evaluations translate every split by beam search and score it; 0: they only measure the loss.
    beam: Annotated[int, Field(ge=0, le=1024)] = 4
    length_penalty: Annotated[float, Field(ge=0, le=10)] = 1.0


class Optim(Section):
    """Optimizer, schedule and what is averaged. Matrices decay; biases, norms, tables do not."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3  # the peak
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    init_learning_rate: NonNegativeFloat = 0.0  # where the warm-up begins
    end_learning_rate: NonNegativeFloat = 0.0  # where the cosine ends
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.9  # of sgd
    weight_decay: NonNegativeFloat = 0.0  # decoupled, multiplied by the learning rate
    clip_norm: NonNegativeFloat = 1.0  # global norm of the gradient; 0: off
    ema: Fraction = 0.0  # decay of the parameters' moving average, used in evaluation; 0: off
    accumulate: PositiveInt = 1  # micro-batches per step; the gradient is that of the whole batch
    skip_nonfinite: NonNegativeInt = 0  # skip so many updates of a run that are NaN or infinite


class Checkpoints(Section):
    """When the state is saved and what is kept. Saving is asynchronous."""

    every: NonNegativeInt = 500  # steps; 0: only at the end
    keep: PositiveInt = 2  # the newest n
    keep_every: NonNegativeInt = 0  # also keep every k-th step for good; 0: off
    # Also keep the best by this metric, e.g. "test/accuracy" or "-test/loss" (smaller is better),
    # among the steps at which evaluation and saving meet.
    best: str | None = None


class Evaluation(Section):
    """When the evaluators run inside training (they always run at the end)."""

    every: NonNegativeInt = 500  # steps; 0: only at the end
    batch_size: PositiveInt | None = None  # None: the training batch size


class Log(Section):
    """What is written while training."""

    every: PositiveInt = 50  # steps between two lines of metrics
    tensorboard: bool = True
    # examples, evenly spread, that every evaluation shows in TensorBoard and wandb (on one host)
    samples: Annotated[int, Field(ge=0, le=64)] = 0
    wandb: str | None = None  # project to report to; needs the extra [wandb]
    profile: tuple[NonNegativeInt, PositiveInt] | None = None  # (first step, steps) to trace


class Parallel(Section):
    """How the step is laid over devices (see `parallel.py`)."""

    mesh: dict[str, int] = {"data": -1}  # axis -> devices; -1: all that are left
    # What is split beside the batch: nothing; parameters and optimizer over the axis "fsdp"; heads
    # and hidden channels over the axis "model"; both.
    strategy: Literal["replicate", "fsdp", "tensor", "fsdp+tensor"] = "replicate"
    compile: Literal["jit", "pmap"] = "jit"  # pmap: one program per device, all replicated
    # blocks: their activations are computed again in the backward pass: less memory, more time
    remat: Literal["none", "blocks"] = "none"
    scan: bool = (
        False  # equal blocks in a row are compiled once: less compile time; best with remat
    )
    # reference: the equations, differentiated by JAX; fused: the same numbers, fewer bytes
    implementation: Literal["fused", "reference"] = "fused"
    # The former name of `implementation`: "tuned" is "fused", "plain" is "reference".
    formulation: Annotated[Literal["tuned", "plain"] | None, Field(exclude=True)] = None
    # Statistics over the global batch, or, under pmap, over what each device has of it.
    batch_norm: Literal["global", "per_device"] = "global"
    # Where compiled programs are kept, to start faster the next time. "auto": in
    # ~/.cache/localglobal/xla, but not on CPU; None: nowhere.
    compilation_cache: str | None = "auto"

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


class Run(Section):
    """A whole run. ``task.name`` decides which of `RUNS` it is, hence what ``data`` may hold."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # beyond, jax.random.key repeats itself
    steps: Annotated[int, Field(gt=0, lt=2**31)] = 1000  # optimizer updates
    batch_size: PositiveInt = 128  # global, over all hosts and devices; of text: in tokens
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    model: dict[str, Any]  # {"name": ..., **fields of the module}
    init: str | None = None  # fine-tune from the variables of this workdir or checkpoint
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

    @property
    def train_rows(self) -> tuple[str, int]:
        """The field that says how many examples a batch has, or a multiple of how many."""
        return "batch_size", self.batch_size

    @property
    def eval_rows(self) -> tuple[str, int]:
        """The same for evaluation."""
        return "eval.batch_size", self.eval.batch_size or self.batch_size


class ClassificationRun(Run):
    """Images and labels: what a run is where ``task.name`` is left out."""

    task: Classification = Classification()
    data: Images = Images()


class TranslationRun(Run):
    """Sentences and their translations."""

    task: Translation
    data: Text = Text()

    @property
    def train_rows(self) -> tuple[str, int]:
        return "data.rows_multiple", self.data.rows_multiple

    eval_rows = train_rows


RUNS: dict[str, type[Run]] = {"classification": ClassificationRun, "translation": TranslationRun}

# Fields that may differ between a run and its resumption: they change nothing that is computed,
# but for the order in which another number of devices adds up, and records that were bad.
MAY_CHANGE = (
    *("checkpoint", "eval", "log"),
    *(
        f"parallel.{field}"
        for field in Parallel.model_fields
        if field not in ("batch_norm", "formulation")
    ),
    "optim.skip_nonfinite",
    *("data.dir", "data.in_memory", "data.max_bad_records", "data.threads"),
)
