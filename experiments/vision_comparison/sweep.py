# SPDX-License-Identifier: Apache-2.0
"""Convolution, attention, CoAtNet, VOLO and Focal at equal parameters, by steps and by time.

    localglobal sweep --config experiments/vision_comparison/sweep.py --workdir runs/vision

MBConv only (CCCC), a plain ViT (S), CoAtNet (CCTT), VOLO and Focal, about 0.5 M parameters each,
on 10 % and 100 % of Fashion-MNIST, 600 steps. `sweep_time` (``--sweep time``) gives each the steps
that fit into the time of CoAtNet's 600, by speed.csv, which `measure.py` writes. These two are of
one setting. `sweep_grid`, `sweep_warmup` and `sweep_final` are the protocol's: the choice is made
with 600 steps on the whole training set, and the final runs are those of both sweeps.
``:size=paper``: ImageNet-1k at about 25 M, all with CoAtNet's recipe; ``:size=tiny``: digits, one
seed.
"""

import csv
import pathlib

from localglobal_jax.config import loading, values
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
LAYOUTS = HERE.parent / "coatnet_layouts" / "sweep.py"
protocol = loading.import_file(HERE.parent / "protocol.py")
# width, width of a head, pixels of a patch, of an image
BASE = {"laptop": (96, 24, 4, 32), "tiny": (32, 16, 2, 8)}


def parse(arg):
    return loading.parse_arg(arg, size=("laptop", "paper", "tiny"), data=("real", "mock"))


def get_config(arg=None):
    arg = parse(arg)
    config = loading.load(f"{LAYOUTS}:size={arg.size},data={arg.data}")
    if arg.size != "paper":  # only what all of the models below have; the runs say the rest
        common = models(arg.size)["CoAtNet"]
        config.model = {key: common[key] for key in ("name", "layout", "depths", "widths")}
    return config


def models_of(arg):
    """Returns the overrides of each model, field by field, by its name."""
    size = parse(arg).size
    flat = PAPER
    if size != "paper":
        flat = {name: values.flatten(found) for name, found in models(size).items()}
    return {name: {f"model.{key}": v for key, v in found.items()} for name, found in flat.items()}


def parts(arg):
    """Returns the overrides of each part of the training set."""
    size = parse(arg).size
    tenth = {"data.train_split": "train[:10%]"}
    if size == "paper":  # epochs equal: 300 of a tenth are a tenth of the steps
        tenth |= {"steps": 9_383, "optim.warmup_steps": 1_000}
    return [{}] if size == "tiny" else [tenth, {"data.train_split": "train"}]


def steps_of_equal_time(arg):
    """Returns the steps of each model but CoAtNet that take as long as CoAtNet's."""
    file = HERE / "speed.csv"
    if parse(arg).size != "laptop" or not file.exists():
        raise ValueError(f"equal time is of size=laptop, and needs {file.name}: run measure.py")
    with open(file, newline="") as opened:
        ratios = {row["model"]: float(row["times_as_fast"]) for row in csv.DictReader(opened)}
    steps = get_config(arg).steps
    return {name: round(steps * ratios[name]) for name in models_of(arg) if name != "CoAtNet"}


def sweep(arg=None):
    """Yields every model with 10 % and 100 % of the training set and every seed, in equal steps."""
    seeds = (0,) if parse(arg).size == "tiny" else protocol.SEEDS
    yield from product({"seed": seeds}, parts(arg), list(models_of(arg).values()))


def sweep_time(arg=None):
    """Yields runs on 100 % that take as long as CoAtNet's steps (its own are in `sweep`)."""
    found = models_of(arg)
    others = [{**found[name], "steps": n} for name, n in steps_of_equal_time(arg).items()]
    yield from product({"seed": protocol.SEEDS}, others)


sweep_grid, sweep_warmup, _final = protocol.sweeps(protocol.IMAGES, HERE, get_config, models_of)


def sweep_final(arg=None):
    """Yields the runs of `sweep` and `sweep_time` at the chosen settings."""
    chosen = list(_final(arg))
    yield from ({**run, **part} for run in chosen for part in parts(arg))
    if parse(arg).size == "laptop":
        found = models_of(arg)
        for name, steps in steps_of_equal_time(arg).items():
            yield from ({**r, "steps": steps} for r in chosen if found[name].items() <= r.items())


def models(size):
    """Fields of each model: 491,138 to 509,820 parameters at laptop size."""
    width, head, patch, image = BASE[size]
    many, widths = width // head, (width // 4, width // 2, width, width)
    coatnet = dict(name="coatnet", widths=widths, strides=(1, 2, 2, 1), stem_stride=patch // 2)
    coatnet["stem"] = (width // 6, width // 4)
    coatnet["blocks"] = dict(C=dict(stride_at="pool"), T=dict(head_width=min(head, width // 2)))
    volo = dict(name="volo", patch=patch, stem=width // 4)
    return {
        "MBConv": {**coatnet, "layout": "CCCC", "depths": (1, 1, 4, 1)},
        "ViT": {
            **volo,
            **dict(layout="S", depths=(4,), widths=(width,), strides=(1,), heads=(many,)),
            **dict(expansion=4.25, position=1, class_blocks=0, aux_head=False),
        },
        "CoAtNet": {**coatnet, "layout": "CCTT", "depths": (1, 2, 3, 1)},
        "VOLO": {
            **volo,
            **dict(layout="OSSS", depths=(3, 1, 1, 1), widths=(width // 2, width, width, width)),
            **dict(strides=(1, 2, 1, 1), heads=(many // 2, many, many, many), class_blocks=1),
        },
        "Focal": {
            **dict(name="focal", layout="FF", depths=(2, 4), widths=(width // 2, width)),
            **dict(heads=(many // 2, many), window=4, expand=(2, 0), levels=(2, 1)),
            **dict(focal_windows=(3, 1), patch=patch, image_size=image, expansion=3.7),
        },
    }


PAPER = {  # depths cut where the named size is larger: 25.0 to 25.4 M parameters
    "MBConv": {"name": "coatnet_cccc"},
    "ViT": {
        **dict(name="volo", layout="S", depths=(13,), widths=(384,), strides=(1,), heads=(6,)),
        **dict(expansion=4.0, position=1, class_blocks=0, aux_head=False, patch=16),
    },
    "CoAtNet": {"name": "coatnet_cctt"},
    "VOLO": {"name": "volo_d1", "depths": (4, 4, 7, 2)},
    "Focal": {"name": "focal_tiny", "depths": (2, 2, 4, 2)},
}
