# SPDX-License-Identifier: Apache-2.0
"""Transformer, MUSE-simple, MUSE and DynamicConv at equal size (arXiv 1911.09483, tables 1, 2, 5).

    localglobal sweep --config experiments/muse_results/sweep.py --workdir runs/results --dry_run

English to German, LibreOffice Help, three seeds. `sweep` is one setting; `sweep_grid`,
`sweep_warmup` and `sweep_final` are the protocol's. ``:size=paper`` is IWSLT14 German to English
and ``:size=wmt`` WMT14 English to German, as the paper has them but for equal parameters; the
files in `configs` name the sources of the data.
"""

import pathlib

from ml_collections import ConfigDict

from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
protocol = loading.import_file(HERE.parent / "protocol.py")
FILES = {
    "laptop": "muse_lohelp",
    "tiny": "muse_lohelp",
    "paper": "muse_iwslt14",
    "wmt": "muse_wmt14",
}
SIZES = tuple(FILES)
# Widths of the pointwise nets that make the sizes equal: 1,528,908 to 1,529,688 parameters
# (paper: 48,180,528 to 48,189,792; wmt: 243,044,688 to 243,063,168).
HIDDEN = {  # Transformer, MUSE-simple, MUSE, DynamicConv
    "laptop": (354, 356, 256, 402),
    "paper": (994, 996, 768, 1136),
    "wmt": (3598, 3600, 3072, 3780),
    "tiny": (64, 64, 32, 64),
}


def parse(arg):
    return loading.parse_arg(arg, size=SIZES, data=("real", "mock"))


def get_config(arg=None):
    arg = parse(arg)
    own = "tiny" if arg.size == "tiny" else "demo" if arg.size == "laptop" else "paper"
    config = loading.load(f"{CONFIGS / FILES[arg.size]}.py:size={own},data={arg.data}")
    noise = dict(input_dropout=0.1) if arg.size == "wmt" else {}
    if arg.size in ("laptop", "tiny"):
        noise = dict(kernel_dropout=0.0)
        config.checkpoint = ConfigDict(dict(every=600))
        config.eval.update(every=0, batch_size=16_384)  # at the end
        config.data.eval_splits = ("test",)
    else:
        config.data.eval_splits = ("valid" if arg.size == "paper" else "validation", "test")
    if arg.size == "laptop":
        # Small batches learn most from a token; in little more than an epoch nothing needs dropout
        config.steps, config.batch_size, config.task.beam = 2400, 512, 1
        config.model.update(widths=(128, 128), hidden=(256, 256), dropout=0.0)
        config.data.update(vocab=3000, max_length=96, buckets=4, rows_multiple=4)
        config.optim.update(learning_rate=1.5e-3, warmup_steps=300)
    if arg.size == "tiny":
        config.task.beam = 0  # after 20 steps no sentence would end
    # The window of DynamicConv grows with depth (arXiv 1901.10430: 3, 7, 15, then 31)
    window = (3, 7, 15, *(31,) * 9)
    plain = {} if arg.size in ("paper", "wmt") else dict(kernel_dropout=0.0)
    config.model.layout = "MM"
    config.model.blocks = ConfigDict(
        dict(M=dict(windows=(3, 15), **noise), D=dict(window=window, **plain))
    )
    return config


def models(size):
    """Returns the overrides of each model, by its name."""
    layouts = (("SS", (3, 15)), ("MM", ()), ("MM", (3, 15)), ("DD", (3, 15)))
    found = (
        {"model.layout": layout, "model.blocks.M.windows": windows, "model.hidden": (width, width)}
        for (layout, windows), width in zip(layouts, HIDDEN[size], strict=True)
    )
    return dict(zip(("Transformer", "MUSE-simple", "MUSE", "DynamicConv"), found, strict=True))


def sweep(arg=None):
    """Yields every model with every seed."""
    size = parse(arg).size
    seeds = (0,) if size == "tiny" else (0, 1, 2)
    yield from product({"seed": seeds}, list(models(size).values()))


def models_of(arg):
    return models(parse(arg).size)


sweep_grid, sweep_warmup, sweep_final = protocol.sweeps(protocol.TEXT, HERE, get_config, models_of)
