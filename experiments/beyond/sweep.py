# SPDX-License-Identifier: Apache-2.0
"""Layouts with content-adaptive convolution, equivariant attention and MUSE's block in images.

    localglobal sweep --config experiments/beyond/sweep.py --workdir runs/beyond

Stages 3 and 4 of CCTT with content-adaptive convolution (CCAA) or translation-equivariant attention
(CCEE) in place of relative attention, and MUSE's parallel block in stages 2 and 3 (CMMT), at equal
size and steps on Fashion-MNIST; `measure.py` then shifts the test images. `sweep` is one setting;
`sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's. ``:size=paper``: ImageNet-1k at
the size of CoAtNet-0; ``:size=tiny``: digits, one seed. Text: `beyond_text`.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
LAYOUTS = HERE.parent / "coatnet_layouts" / "sweep.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
# Depths that make the sizes equal: 498,576 to 499,216 parameters at laptop size, 24,990,260 to
# 25,118,104 at the paper's.
DEPTHS = {
    "laptop": {
        **dict.fromkeys(("CCTT", "CCAA", "CCEE"), (1, 2, 3, 1)),
        "CMMT": (1, 1, 3, 1),
    },
    "paper": {
        **dict.fromkeys(("CCTT", "CCAA", "CCEE"), (2, 3, 5, 2)),
        "CMMT": (2, 3, 4, 2),
    },
    "tiny": dict.fromkeys(("CCTT", "CCAA", "CCEE", "CMMT"), (1, 1, 1, 1)),
}


def get_config(arg=None):
    arg = parse(arg)
    config = loading.load(f"{LAYOUTS}:size={arg.size},data={arg.data}")
    if arg.size == "paper":
        config.model.update(layout="CCTT", depths=DEPTHS["paper"]["CCTT"])
        return config
    head = config.model.blocks.T.head_width
    # grids are 8, 4 and 4 there: windows reach less far than on the paper's 28, 14 and 7
    config.model.blocks.update(
        A=dict(head_width=head, window=3),
        E=dict(head_width=head),
        M=dict(head_width=head, windows=(3, 5), expansion=3.5),
    )
    config.model.depths = DEPTHS[arg.size]["CCTT"]
    return config


def parse(arg):
    return loading.parse_arg(arg, size=("laptop", "paper", "tiny"), data=("real", "mock"))


def models_of(arg):
    """Returns the overrides of each model, by its layout."""
    depths = DEPTHS[parse(arg).size]
    return {name: {"model.layout": name, "model.depths": own} for name, own in depths.items()}


def sweep(arg=None):
    """Yields every layout with every seed."""
    seeds = (0,) if parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, list(models_of(arg).values()))


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(
    protocol.IMAGES, HERE, get_config, models_of
)
