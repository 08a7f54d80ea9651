# SPDX-License-Identifier: Apache-2.0
"""Translation with A and E, beside Transformer, relative attention and MUSE.

    localglobal sweep --config experiments/beyond_text/sweep.py --workdir runs/beyond_text --dry_run

Five models of equal size, three seeds, trained on pairs of up to 96 tokens and of up to 24, to
measure the second kind on longer sentences. T, A and E use displacements and get no positions.
`sweep` is one setting; `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's. The
choice is made with the longer pairs; the final runs have both lengths. `measure.py` reads the runs.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "muse_results" / "sweep.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
NAMES = ("Transformer", "MUSE", "relative", "A", "E")
LAYOUTS = {  # and their positions
    "SS": "sinusoidal",
    "MM": "sinusoidal",
    "TT": "none",
    "AA": "none",
    "EE": "none",
}
# Widths of the pointwise nets that make the sizes equal: 1,019,272 to 1,019,512 parameters
# (paper: 48,180,528 to 48,192,912)
HIDDEN = {
    "laptop": (354, 256, 352, 354, 352),
    "paper": (994, 768, 994, 994, 994),
    "tiny": (64, 32, 64, 64, 64),
}
# Tokens of the longest pair in training
LENGTHS = {"laptop": (96, 24), "paper": (176, 32), "tiny": (48, 24)}


def parse(arg):
    return loading.parse_arg(arg, size=("laptop", "paper", "tiny"), data=("real", "mock"))


def get_config(arg=None):
    config = loading.load(f"{RESULTS}:{arg or ''}")
    size = parse(arg).size
    config.model.blocks.update(T=dict(furthest=64), E=dict(furthest=64), A=dict(window=15))
    config.model.positions = "sinusoidal"
    config.data.eval_splits = ("valid" if size == "paper" else "validation",)
    config.data.max_length = LENGTHS[size][0]
    if size == "laptop":
        config.steps, config.optim.warmup_steps = 1200, 200
        config.task.beam = 0  # measure.py translates
        config.model.depths = (2, 2)
        config.data.update(vocab=2000, buckets=3)
    return config


def models_of(arg):
    """Returns the overrides of each model, by its name."""
    found = (
        {"model.layout": layout, "model.positions": positions, "model.hidden": (width, width)}
        for (layout, positions), width in zip(LAYOUTS.items(), HIDDEN[parse(arg).size], strict=True)
    )
    return dict(zip(NAMES, found, strict=True))


def lengths(arg):
    return {"data.max_length": LENGTHS[parse(arg).size]}


def sweep(arg=None):
    """Yields every model with every length and every seed."""
    seeds = (0,) if parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds, **lengths(arg)}, list(models_of(arg).values()))


sweep_grid, sweep_warmup, _final = protocol.sweeps(protocol.TEXT, HERE, get_config, models_of)


def sweep_final(arg=None):
    """Yields every model at its chosen setting with every seed and every length."""
    yield from product(list(_final(arg)), lengths(arg))
