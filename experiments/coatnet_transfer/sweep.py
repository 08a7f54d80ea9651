# SPDX-License-Identifier: Apache-2.0
"""Transfer of CCTT and CTTT (CoAtNet, arXiv 2106.04803, section 4.3, table 7).

    C=experiments/coatnet_transfer/sweep.py R=runs/coatnet_transfer
    localglobal sweep --config $C:stage=pretrain --workdir $R/pretrain
    localglobal sweep --config $C --workdir $R/finetune

Both are pre-trained on Fashion-MNIST and fine-tuned for 30 epochs on a tenth of digits, another
tenth for each seed. The same steps without pre-training are the
baseline. The second stage finds the first
in ``pretrained=runs/coatnet_transfer/pretrain``, by the names that its sweep gives them.
``:size=paper``: Places, then ImageNet-1k at 224, in place of the paper's JFT-300M.

`sweep` is one setting; `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's. They tune
the second stage, with and without pre-training; the first stage has a run for each of their seeds.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product
from localglobal_jax.launch import expand

HERE = pathlib.Path(__file__).parent
LAYOUTS = HERE.parent / "coatnet_layouts" / "sweep.py"
FINETUNE = HERE.parents[1] / "configs" / "coatnet_finetune.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
# The choice trains on one reported tenth, and looks at the two others: not at the test images
HELD_OUT = "train[10%:30%]"
KIND = protocol.IMAGES._replace(
    choice={"data.train_split": "train[:10%]", "data.eval_splits": (HELD_OUT,)},
    metric=f"{HELD_OUT}/accuracy",
)
# Of the layouts' study: the depths that make the two equal
SIZES = {"laptop": (1, 2, 3, 1), "tiny": (1, 1, 3, 1)}


def parse(arg):
    return loading.parse_arg(
        arg,
        size=("laptop", "paper", "tiny"),
        data=("real", "mock"),
        stage=("finetune", "pretrain"),
        pretrained="runs/coatnet_transfer/pretrain",
    )


def get_config(arg=None):
    arg = parse(arg)
    if arg.size == "paper" and arg.stage == "finetune":  # 75,000 steps of 512 are 30 epochs
        return loading.load(f"{FINETUNE}:resolution=224,data={arg.data}")
    config = loading.load(f"{LAYOUTS}:size={arg.size},data={arg.data}")
    if arg.size == "paper":
        config.update(steps=13_000)  # five epochs
        config.data.update(name="placesfull", train_split="train[:99%]")
        config.data.eval_splits = ("train[99%:]",)
        config.checkpoint.best = "train[99%:]/accuracy"
        config.optim.warmup_steps = 1_000
    elif arg.stage == "finetune":
        tiny = arg.size == "tiny"
        config.update(steps=10 if tiny else 135, batch_size=32)  # 30 epochs of 144 pictures
        # 8x8 pixels, enlarged; what no seed trains on
        config.data.update(name="digits", flip=False, eval_splits=("train[30%:]+test",))
        config.optim.update(learning_rate=5e-4, warmup_steps=5, ema=0.95)
    return config


def sweep(arg=None):
    """Yields both layouts with every seed; the second stage with and without pre-training.

    The first stage has the seed of the protocol's choice, too, except at the paper's size.
    Without pre-training it needs the first stage's learning rate. At laptop size that rate is tried
    with pre-training, too, because 135 steps at a quarter of it leave the digits half learned.
    """
    parsed = parse(arg)
    paper = parsed.size == "paper"
    seeds = (0,) if parsed.size == "tiny" else protocol.SEEDS
    if parsed.stage == "pretrain":
        more = () if paper else (protocol.CHOICE,)
        yield from product({"seed": (*seeds, *more)}, layouts(parsed.size))
        return
    started = [
        {"init": init, **run.overrides} | part(run.run.seed, paper)
        for init, run in pretrained(parsed).items()
        if run.run.seed in seeds
    ]
    rate = {"optim.learning_rate": 1e-3 if paper else 2e-3}
    seeds = [{"seed": seed, **part(seed, paper)} for seed in seeds]
    yield from started
    yield from product(seeds, layouts(parsed.size), [rate])
    if parsed.size == "laptop":
        yield from ({**found, **rate} for found in started)


def pretrained(parsed):
    """Returns the described runs of the first stage by their folders."""
    given = f"stage=pretrain,size={parsed.size},data={parsed.data}"
    runs = expand.expand(f"{HERE / 'sweep.py'}:{given}", parsed.pretrained).runs
    return {f"{parsed.pretrained.rstrip('/')}/{run.name}": run for run in runs}


def layouts(size):
    if size == "paper":
        return [{"model.name": "coatnet_cctt"}, {"model.name": "coatnet_cttt"}]
    return [{"model.layout": name, "model.depths": SIZES[size]} for name in ("CCTT", "CTTT")]


def part(seed, paper):
    """Returns the tenth of the training set that a seed fine-tunes on."""
    return {} if paper else {"data.train_split": f"train[{10 * seed}%:{10 * seed + 10}%]"}


def models_of(arg):
    """Returns the overrides of each layout, from nothing and pre-trained, by its name.

    ``init`` is empty from nothing, here and in a CSV file. For the others `begun` adds the folder,
    which depends on the seed.
    """
    parsed = parse(arg)
    if parsed.size == "paper" or parsed.stage == "pretrain":
        raise ValueError("the protocol tunes stage=finetune, at size=laptop: leave both out")
    found = {model["model.layout"]: model for model in layouts(parsed.size)}
    alone = {f"{name} from nothing": {**model, "init": ""} for name, model in found.items()}
    return {**alone, **{f"{name} pre-trained": model for name, model in found.items()}}


def between(arg):
    """Returns the config at the middle of the grid, whose ends are the two rates of `sweep`."""
    config = get_config(arg)
    config.optim.learning_rate = 1e-3
    return config


def begun(runs, arg):
    """Yields runs of the second stage; pre-trained ones have the ``init`` of their seed."""
    first = {
        (run.run.seed, run.overrides["model.layout"]): init
        for init, run in pretrained(parse(arg)).items()
    }
    for run in runs:
        own = {key: value for key, value in run.items() if key != "init"}
        start = {} if "init" in run else {"init": first[run["seed"], run["model.layout"]]}
        yield {**start, **own}


_grid, _warmup, _final = protocol.sweeps(KIND, HERE, between, models_of)


def sweep_grid(arg=None):
    """Yields both layouts, from nothing and pre-trained, with every rate."""
    yield from begun(_grid(arg), arg)


def sweep_warmup(arg=None):
    """Yields them at the best rate of each, with every warm-up."""
    yield from begun(_warmup(arg), arg)


def sweep_final(arg=None):
    """Yields them at the chosen setting of each, every seed with a tenth of its own."""
    yield from ({**run, **part(run["seed"], paper=False)} for run in begun(_final(arg), arg))
