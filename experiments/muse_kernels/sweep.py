# SPDX-License-Identifier: Apache-2.0
"""Convolutions beside attention: MUSE's ablations (arXiv 1911.09483, tables 6, 7).

    localglobal sweep --config experiments/muse_kernels/sweep.py --workdir runs/kernels --dry_run

Twelve variants of equal size, three seeds. The pointwise nets shrink by the parameters of
the convolution. Where they are missing or share their input, the model is wider.
"""

import pathlib

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

RESULTS = pathlib.Path(__file__).parents[1] / "muse_results" / "sweep.py"
# (windows, kind, projection, ffn); "growing": one window a layer, wider and wider
VARIANTS = (
    ((3, 15), "dynamic", "shared", "own"),
    ((), "dynamic", "shared", "own"),
    ((3,), "dynamic", "shared", "own"),
    ((7,), "dynamic", "shared", "own"),
    ((15,), "dynamic", "shared", "own"),
    ((31,), "dynamic", "shared", "own"),
    ("growing", "dynamic", "shared", "own"),
    ((3,), "dynamic", "separate", "own"),
    ((3,), "depthwise", "shared", "own"),
    ((3,), "standard", "separate", "own"),
    ((3, 15), "dynamic", "shared", "off"),
    ((7,), "dynamic", "shared", "shared"),
)
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


def sweep(arg=None):
    """Yields every variant with every seed."""
    size = parse(arg).size
    models = (overrides(size, *variant) for variant in VARIANTS)
    yield from product({"seed": (0,) if size == "tiny" else (0, 1, 2)}, models)


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
