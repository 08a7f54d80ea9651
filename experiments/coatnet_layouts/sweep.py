# SPDX-License-Identifier: Apache-2.0
"""The layouts of CoAtNet (arXiv 2106.04803, section 4.3) at a small size.

    localglobal sweep --config experiments/coatnet_layouts/sweep.py --workdir runs/layouts --dry_run

Six layouts of about 0.5 M parameters, 1 %, 10 % and 100 % of Fashion-MNIST, three seeds. All runs
take 600 steps of 64 images: 64 epochs of 1 % (generalisation), 0.6 epochs of 100 %
(capacity). ``:size=paper`` is ImageNet-1k with the layouts of 25 M, and `sweep_capacity` (``--sweep
capacity``) five epochs of ten million images. ``:size=tiny``: one seed, digits, 20 steps each.
`sweep` is one setting; `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's: the
choice is made on the whole training set, and the final runs have all three parts of it.
"""

import pathlib

from ml_collections import ConfigDict

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
protocol = loading.import_file(HERE.parent / "protocol.py")
# Depths that make the sizes equal: 499,216 to 524,008 parameters (ViT-rel: 490,810).
DEPTHS = {
    "CCCC": (1, 1, 4, 1),
    "CCCT": (1, 1, 4, 1),
    "CCTT": (1, 2, 3, 1),
    "CTTT": (1, 2, 3, 1),
    "TTTT": (1, 2, 3, 1),
}
TINY = {**DEPTHS, "CCCT": (1, 2, 3, 1), **dict.fromkeys(("CCTT", "CTTT", "TTTT"), (1, 1, 3, 1))}
NAMED = ("coatnet_cccc", "coatnet_ccct", "coatnet_cctt", "coatnet_cttt", "coatnet_tttt", "vit_rel")


def parse(arg):
    return loading.parse_arg(arg, size=("laptop", "paper", "tiny"), data=("real", "mock"))


def get_config(arg=None):
    arg = parse(arg)
    if arg.size == "paper":
        return loading.load(f"{CONFIGS / 'coatnet_imagenet.py'}:variant=0,data={arg.data}")
    config = ConfigDict(dict(seed=0, steps=600, batch_size=64))
    # The stem halves 32x32 pixels; the stages see grids of 16, 8, 4 and 4.
    config.model = ConfigDict(
        dict(
            name="coatnet",
            layout="CCTT",
            depths=DEPTHS["CCTT"],
            widths=(24, 48, 96, 96),
            strides=(1, 2, 2, 1),
            stem=(16, 24),
            stem_stride=2,
            blocks=dict(C=dict(stride_at="pool"), T=dict(head_width=24, expansion=4.0)),
        )
    )
    config.data = ConfigDict(
        dict(
            name="fashion_mnist",
            mock=arg.data == "mock",
            train_split="train",
            # the same 600 pictures in every run, as they are: 1 % of the training set
            eval_splits=("test", "train[:1%]"),
            image_size=(32, 32),
            mean=(0.286,),  # of the training set
            std=(0.353,),
            crop="pad",
            pad=1,
            flip=True,
        )
    )
    config.optim = ConfigDict(
        dict(learning_rate=2e-3, warmup_steps=60, weight_decay=0.05, ema=0.99)
    )
    config.eval = ConfigDict(dict(every=0, batch_size=512))  # at the end: nothing is selected
    config.checkpoint = ConfigDict(dict(every=300, keep=1))
    config.log = ConfigDict(dict(every=100, tensorboard=False))
    if arg.size == "tiny":
        config.steps, config.batch_size, config.eval.batch_size = 20, 32, 128
        config.model.update(depths=TINY["CCTT"], widths=(16, 16, 32, 32), stem=(8, 16))
        config.model.update(strides=(1, 2, 1, 1), stem_stride=1)
        config.model.blocks.T.head_width = 16
        config.data.update(name="digits", image_size=(8, 8), flip=False, eval_splits=("test",))
        config.optim.warmup_steps = 5
        config.eval.every = config.checkpoint.every = config.log.every = 10
    return config


def models_of(arg):
    """Returns the overrides of each layout, by its name."""
    size = parse(arg).size
    if size == "paper":
        return {name: {"model.name": name} for name in NAMED}
    depths = TINY if size == "tiny" else DEPTHS
    found = {name: {"model.layout": name, "model.depths": own} for name, own in depths.items()}
    return {**found, "ViT-rel": vit_rel(size == "tiny")}


def parts(arg):
    """Returns the parts of the training set, which only laptop size has."""
    shares = ("train[:1%]", "train[:10%]", "train")
    return {"data.train_split": shares} if parse(arg).size == "laptop" else {}


def sweep(arg=None):
    """Yields every layout with every seed, at laptop size with three parts of the training set."""
    seeds = (0,) if parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, parts(arg), list(models_of(arg).values()))


sweep_grid, sweep_warmup, _final = protocol.sweeps(protocol.IMAGES, HERE, get_config, models_of)


def sweep_final(arg=None):
    """Yields every layout at its chosen setting with every seed and part of the training set."""
    yield from product(list(_final(arg)), parts(arg))


def sweep_capacity(arg=None):
    """Yields, for ``size=paper``, five epochs of Places, because JFT-300M is not public."""
    if parse(arg).size != "paper":
        raise ValueError("sweep_capacity is of size=paper; sweep() has 100 % of Fashion-MNIST")
    places = {"data.name": "placesfull", "data.train_split": "train[:99%]"}
    places |= {"data.eval_splits": ("train[99%:]",), "checkpoint.best": "train[99%:]/accuracy"}
    places |= {"steps": 13_000, "optim.warmup_steps": 1_000}
    yield from product({"seed": (0, 1, 2)}, [places], {"model.name": NAMED})


def vit_rel(tiny):
    """Returns a model of patches and relative attention at one resolution."""
    width = 32 if tiny else 96
    wider = {} if tiny else {"model.blocks.T.expansion": 4.5}
    return {
        "model.layout": "T",
        "model.depths": (5,) if tiny else (4,),
        "model.widths": (width,),
        "model.strides": (1,),
        "model.stem": (width,),
        "model.stem_stride": 2 if tiny else 4,
        **wider,
    }
