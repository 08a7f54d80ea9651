# SPDX-License-Identifier: Apache-2.0
"""The two new operators at 3 M parameters, one epoch of Fashion-MNIST.

    localglobal sweep --config experiments/beyond_large/sweep.py --workdir runs/large --dry_run

Stages 3 and 4 have relative attention (CCTT), convolution (CCCC), content-adaptive convolution
(CCAA) or translation-equivariant attention (CCEE). CMMT has MUSE's parallel block in stages 2 and
3. `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's. `sweep` is the first setting
of the grid with the reported seeds; it was not run. ``:size=paper`` and ``:size=tiny`` are those of
`beyond`.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
BEYOND = HERE.parent / "beyond" / "sweep.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
beyond = loading.import_file(BEYOND)
# Depths that make the sizes equal: 3,023,002 to 3,036,558 parameters
DEPTHS = {
    **dict.fromkeys(("CCTT", "CCAA", "CCEE"), (1, 3, 3, 3)),
    "CCCC": (1, 2, 6, 3),
    "CMMT": (1, 2, 3, 3),
}


def get_config(arg=None):
    config = loading.load(f"{BEYOND}:{arg or ''}")
    if beyond.parse(arg).size != "laptop":
        return config
    # One epoch of batches of 64. The stages see grids of 16, 8, 8 and 4.
    config.steps, config.optim.warmup_steps = 938, 94
    config.model.update(depths=DEPTHS["CCTT"], widths=(32, 64, 128, 256), strides=(1, 2, 1, 2))
    config.model.stem = (24, 32)
    for block in "TAEM":
        config.model.blocks[block].head_width = 32
    config.data.eval_splits = ("test",)
    return config


def models_of(arg):
    """Returns the overrides of each model, by its layout."""
    if beyond.parse(arg).size != "laptop":
        return beyond.models_of(arg)
    return {name: {"model.layout": name, "model.depths": own} for name, own in DEPTHS.items()}


def sweep(arg=None):
    """Yields every layout with every seed."""
    seeds = (0,) if beyond.parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, list(models_of(arg).values()))


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(
    protocol.IMAGES, HERE, get_config, models_of
)
