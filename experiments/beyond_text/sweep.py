# SPDX-License-Identifier: Apache-2.0
"""Translation with A and E, beside Transformer, relative attention and MUSE.

    localglobal sweep --config experiments/beyond_text/sweep.py --workdir runs/beyond_text --dry_run

Five models of equal size, three seeds, trained on pairs of up to 96 tokens and of up to 24, to
measure the second kind on longer sentences. T, A and E use displacements and get no positions.
`measure.py` reads the runs.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

RESULTS = pathlib.Path(__file__).parents[1] / "muse_results" / "sweep.py"
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
    config.model.blocks.update(T=dict(furthest=64), E=dict(furthest=64), A=dict(window=15))
    config.model.positions = "sinusoidal"
    config.data.eval_splits = ("valid" if parse(arg).size == "paper" else "validation",)
    if parse(arg).size == "laptop":
        config.steps, config.optim.warmup_steps = 1200, 200
        config.task.beam = 0  # measure.py translates
        config.model.depths = (2, 2)
        config.data.update(vocab=2000, buckets=3)
    return config


def sweep(arg=None):
    """Yields every model with every length and every seed."""
    size = parse(arg).size
    models = (
        {"model.layout": layout, "model.positions": positions, "model.hidden": (width, width)}
        for (layout, positions), width in zip(LAYOUTS.items(), HIDDEN[size], strict=True)
    )
    seeds = (0,) if size == "tiny" else (0, 1, 2)
    yield from product({"seed": seeds, "data.max_length": LENGTHS[size]}, models)
