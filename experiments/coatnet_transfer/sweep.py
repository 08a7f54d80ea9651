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
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product
from localglobal_jax.launch import expand

HERE = pathlib.Path(__file__)
LAYOUTS = HERE.parents[1] / "coatnet_layouts" / "sweep.py"
FINETUNE = HERE.parents[2] / "configs" / "coatnet_finetune.py"
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

    Without pre-training it needs the first stage's learning rate. At laptop size that rate is tried
    with pre-training, too, because 135 steps at a quarter of it leave the digits half learned.
    """
    parsed = parse(arg)
    seeds = (0,) if parsed.size == "tiny" else (0, 1, 2)
    if parsed.stage == "pretrain":
        yield from product({"seed": seeds}, layouts(parsed.size))
        return
    given = f"stage=pretrain,size={parsed.size},data={parsed.data}"
    first = expand.expand(f"{HERE}:{given}", parsed.pretrained).runs
    paper = parsed.size == "paper"
    started = [
        {"init": f"{parsed.pretrained.rstrip('/')}/{run.name}", **run.overrides}
        | part(run.run.seed, paper)
        for run in first
    ]
    rate = {"optim.learning_rate": 1e-3 if paper else 2e-3}
    seeds = [{"seed": seed, **part(seed, paper)} for seed in seeds]
    yield from started
    yield from product(seeds, layouts(parsed.size), [rate])
    if parsed.size == "laptop":
        yield from ({**found, **rate} for found in started)


def layouts(size):
    if size == "paper":
        return [{"model.name": "coatnet_cctt"}, {"model.name": "coatnet_cttt"}]
    return [{"model.layout": name, "model.depths": SIZES[size]} for name in ("CCTT", "CTTT")]


def part(seed, paper):
    """Returns the tenth of the training set that a seed fine-tunes on."""
    return {} if paper else {"data.train_split": f"train[{10 * seed}%:{10 * seed + 10}%]"}
