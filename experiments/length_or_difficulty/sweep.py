# SPDX-License-Identifier: Apache-2.0
"""Positions (absolute, relative, none) by operators (attention, convolution, both), translation.

    python -m experiments.length_or_difficulty.prepare runs/length/data
    localglobal sweep --config experiments/length_or_difficulty/sweep.py --workdir runs/length/one

Trains on the files of `prepare.py`, in which half of the long inputs are joined short sentences.
``:files=FOLDER`` names another folder than runs/length/data. `sweep` is one setting; `sweep_grid`,
`sweep_warmup` and `sweep_final` are the protocol's. ``:size=tiny``: 20 steps, one seed.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
protocol = loading.import_file(HERE.parent / "protocol.py")

# operator, positions: letters of the layers, `model.positions`. A convolution knows displacements
# within its window, so "relative" is the same as "none" for it and is listed once.
MODELS = {
    ("attention", "absolute"): ("SS", "sinusoidal"),
    ("attention", "relative"): ("TT", "none"),
    ("attention", "none"): ("SS", "none"),
    ("convolution", "absolute"): ("DD", "sinusoidal"),
    ("convolution", "none"): ("DD", "none"),
    ("both", "absolute"): ("MM", "sinusoidal"),
    ("both", "none"): ("MM", "none"),
}
# Widths of the pointwise nets that make the sizes equal
HIDDEN = {
    "laptop": {"SS": 514, "TT": 512, "DD": 594, "MM": 384},
    "paper": {"SS": 994, "TT": 994, "DD": 1136, "MM": 768},
    "tiny": {"SS": 64, "TT": 64, "DD": 64, "MM": 32},
}


def parse(arg):
    sizes = ("laptop", "paper", "tiny")
    return loading.parse_arg(arg, size=sizes, data=("real", "mock"), files="runs/length/data")


def get_config(arg=None):
    arg = parse(arg)
    if arg.size == "paper":
        config = loading.load(f"{CONFIGS / 'muse_iwslt14'}.py:data={arg.data}")
        config.data.update(tokenizer="bpe", vocab=8000, dicts=())
    else:
        own = "tiny" if arg.size == "tiny" else "demo"
        config = loading.load(f"{CONFIGS / 'muse_lohelp'}.py:size={own},data={arg.data}")
        config.eval.every = 0  # at the end: nothing is selected
        config.checkpoint = dict(every=400)
    if arg.data == "real":
        folder = pathlib.Path(arg.files).absolute()
        config.data.name = "text_pairs"
        config.data.files = tuple(f"{folder}/{{split}}.{side}" for side in ("source", "target"))
    config.data.eval_splits = ("validation",)
    config.task.beam = 0  # measure.py translates
    config.model.pre_norm = (True, True)
    config.model.positions = "sinusoidal"
    config.model.blocks = dict(
        M=dict(kernel_dropout=0.0),
        D=dict(window=(3, 7, 15, *(31,) * 9), kernel_dropout=0.0),
        T=dict(furthest=64),
    )
    return config


def models(size):
    """Returns the overrides of each model, by its operator and positions."""
    return {
        name: {
            "model.layout": layout,
            "model.positions": positions,
            "model.hidden": (HIDDEN[size][layout],) * 2,
        }
        for name, (layout, positions) in MODELS.items()
    }


def sweep(arg=None):
    """Yields every model with every seed, at one setting."""
    size = parse(arg).size
    seeds = (0,) if size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, list(models(size).values()))


def models_of(arg):
    return models(parse(arg).size)


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(protocol.TEXT, HERE, get_config, models_of)
