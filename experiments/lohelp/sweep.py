# SPDX-License-Identifier: Apache-2.0
"""MUSE and the Transformer at 3.3 M parameters on LibreOffice Help (`configs/muse_lohelp.py`).

    localglobal sweep --config experiments/lohelp/sweep.py --workdir runs/lohelp --dry_run

`sweep` is one setting with three seeds; `sweep_grid`, `sweep_warmup` and `sweep_final` are the
protocol's. ``:size=paper`` is IWSLT14 German to English; ``:size=tiny``: 20 steps, one seed.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
protocol = loading.import_file(HERE.parent / "protocol.py")
# Widths of the pointwise nets that make the sizes equal: 3,296,652 and 3,296,268 parameters
HIDDEN = {  # MUSE, Transformer
    "laptop": (384, 514),
    "paper": (768, 994),
    "tiny": (32, 64),
}


def parse(arg):
    return loading.parse_arg(arg, size=tuple(HIDDEN), data=("real", "mock"))


def get_config(arg=None):
    arg = parse(arg)
    if arg.size == "paper":
        config = loading.load(f"{CONFIGS / 'muse_iwslt14'}.py:data={arg.data}")
    else:
        own = "tiny" if arg.size == "tiny" else "demo"
        config = loading.load(f"{CONFIGS / 'muse_lohelp'}.py:size={own},data={arg.data}")
    config.data.eval_splits = ("test",)
    config.eval.every = 0  # at the end: nothing is selected
    config.checkpoint = dict(every=400)
    if arg.size == "tiny":
        config.task.beam = 0  # after 20 steps no sentence would end
    return config


def models_of(arg):
    """Returns the overrides of each model, by its name."""
    muse, transformer = HIDDEN[parse(arg).size]
    return {
        "MUSE": {"model.layout": "MM", "model.hidden": (muse, muse)},
        "Transformer": {"model.layout": "SS", "model.hidden": (transformer, transformer)},
    }


def sweep(arg=None):
    """Yields both models with every seed."""
    seeds = (0,) if parse(arg).size == "tiny" else (0, 1, 2)
    yield from product({"seed": seeds}, list(models_of(arg).values()))


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(protocol.TEXT, HERE, get_config, models_of)
