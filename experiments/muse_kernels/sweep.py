# SPDX-License-Identifier: Apache-2.0
"""Convolutions beside attention: MUSE's ablations (arXiv 1911.09483, tables 6, 7).

    localglobal sweep --config experiments/muse_kernels/sweep.py --workdir runs/kernels --dry_run

Twelve variants of equal size, three seeds. The pointwise nets shrink by the parameters of
the convolution. Where they are missing or share their input, the model is wider. `sweep` is one
setting; `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "muse_results" / "sweep.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
# (windows, kind, projection, ffn); "growing": one window a layer, wider and wider
VARIANTS = {
    "adaptive (3, 15)": ((3, 15), "dynamic", "shared", "own"),
    "no convolution": ((), "dynamic", "shared", "own"),
    "3": ((3,), "dynamic", "shared", "own"),
    "7": ((7,), "dynamic", "shared", "own"),
    "15": ((15,), "dynamic", "shared", "own"),
    "31": ((31,), "dynamic", "shared", "own"),
    "growing": ("growing", "dynamic", "shared", "own"),
    "3, own projection": ((3,), "dynamic", "separate", "own"),
    "3, static kernel": ((3,), "depthwise", "shared", "own"),
    "3, standard, own projection": ((3,), "standard", "separate", "own"),
    "adaptive, no pointwise net": ((3, 15), "dynamic", "shared", "off"),
    "7, pointwise net shares its input": ((7,), "dynamic", "shared", "shared"),
}
GROWING = {"laptop": ((3,), (7,), (15,)), "tiny": ((3,), (7,), (15,))}
GROWING["paper"] = ((3,),) * 3 + ((7,),) * 3 + ((15,),) * 3 + ((31,),) * 3
# Width of the model, with pointwise nets of their own, without, with shared ones: 1,380,248 to
# 1,409,004 parameters
WIDTHS = {
    "laptop": {"own": 128, "off": 156, "shared": 148},
    "paper": {"own": 384, "off": 468, "shared": 444},
    "tiny": {"own": 32, "off": 36, "shared": 36},
}


def parse(arg):
    return loading.parse_arg(arg, size=("laptop", "paper", "tiny"), data=("real", "mock"))


def get_config(arg=None):
    config = loading.load(f"{RESULTS}:{arg or ''}")
    config.model.blocks.M.update(kind="dynamic", projection="shared", ffn="own")
    if parse(arg).size == "laptop":
        config.steps, config.optim.warmup_steps = 1200, 200
        config.data.update(vocab=2000, buckets=3)
    if parse(arg).size != "paper":
        config.model.hidden = (256, 256)
    return config


def models_of(arg):
    """Returns the overrides of each variant, by its name."""
    size = parse(arg).size
    return {name: overrides(size, *variant) for name, variant in VARIANTS.items()}


def sweep(arg=None):
    """Yields every variant with every seed."""
    seeds = (0,) if parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, list(models_of(arg).values()))


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(protocol.TEXT, HERE, get_config, models_of)


def overrides(size, windows, kind, projection, ffn):
    width = WIDTHS[size][ffn]
    hidden = 768 if size == "paper" else 256
    per_layer = GROWING[size] if windows == "growing" else (windows,)
    spent = sum(convolution(width, w, kind, projection) for w in per_layer) / len(per_layer)
    more = convolution(width, (3, 15), "dynamic", "shared") - spent  # than the first variant's
    hidden = max(16, hidden + round(more / (2 * width + 1))) if ffn == "own" else hidden
    return {
        "model.blocks.M.windows": GROWING[size] if windows == "growing" else windows,
        "model.blocks.M.kind": kind,
        "model.blocks.M.projection": projection,
        "model.blocks.M.ffn": ffn,
        "model.widths": (width, width),
        "model.hidden": (hidden, hidden),
    }


def convolution(width, windows, kind, projection):
    """Returns the parameters of a layer's convolution, for four heads."""
    if not windows:
        return 0
    each = {"dynamic": 4, "depthwise": 1, "standard": width}[kind] * width
    own = width * (width + 1) if projection == "separate" else 0
    return each * sum(windows) + width**2 + own
