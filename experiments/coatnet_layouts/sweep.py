# SPDX-License-Identifier: Apache-2.0
"""Where should attention begin? The layouts of CoAtNet (arXiv 2106.04803, section 4.3) in small.

    localglobal sweep --config experiments/coatnet_layouts/sweep.py --workdir runs/layouts --dry_run

Six layouts of about 0.6 M parameters, three seeds, Fashion-MNIST. ``:size=tiny`` is what the README
walks through: one seed, digits, 20 steps each.
"""

from ml_collections import ConfigDict

from localglobal_jax.configlib import parse_arg
from localglobal_jax.sweeps import chain, product

# Depths that make the sizes equal: 588,270 to 609,746 parameters (ViT-rel: 564,529).
DEPTHS = {
    "CCCC": (1, 1, 4, 1),
    "CCCT": (1, 2, 3, 1),
    "CCTT": (1, 1, 3, 1),
    "CTTT": (1, 1, 3, 1),
    "TTTT": (1, 1, 3, 1),
}


def parse(arg):
    return parse_arg(arg, size=("laptop", "tiny"), data=("real", "mock"))


def get_config(arg=None):
    arg = parse(arg)
    config = ConfigDict()
    config.seed = 0
    config.steps = 3300  # seven epochs
    config.batch_size = 128

    # 28x28 pixels: the stem halves them, the first stage sees 14x14, the others 7x7
    config.model = ConfigDict(
        dict(
            name="coatnet",
            layout="CCTT",
            depths=DEPTHS["CCTT"],
            widths=(32, 64, 96, 128),
            strides=(1, 2, 1, 1),
            stem=(16, 32),
            stem_stride=2,
            blocks=dict(C=dict(stride_at="pool"), T=dict(head_width=32)),
        )
    )
    config.data = ConfigDict(
        dict(
            name="fashion_mnist",
            mock=arg.data == "mock",
            image_size=(28, 28),
            mean=(0.286,),  # of the training set
            std=(0.353,),
            crop="pad",
            pad=1,
            flip=True,
        )
    )
    config.optim = ConfigDict(
        dict(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, ema=0.99)
    )
    config.eval = ConfigDict(dict(every=400, batch_size=512))
    config.checkpoint = ConfigDict(dict(every=400, best="test/accuracy"))
    if arg.size == "tiny":
        config.steps, config.batch_size, config.eval.batch_size = 20, 32, 128
        config.model.update(widths=(16, 16, 32, 32), stem=(8, 16), stem_stride=1)
        config.model.blocks.T.head_width = 16
        config.data.update(name="digits", image_size=(8, 8), flip=False)
        config.optim.warmup_steps = 5
        config.eval.every = config.checkpoint.every = 10
    return config


def sweep(arg=None):
    """Every layout with every seed."""
    tiny = parse(arg).size == "tiny"
    yield from product(
        {"seed": (0,) if tiny else (0, 1, 2)},
        chain(
            ({"model.layout": name, "model.depths": depths} for name, depths in DEPTHS.items()),
            [vit_rel(tiny)],
        ),
    )


def vit_rel(tiny):
    """Patches, then relative attention at one resolution: no layout, no hierarchy."""
    width = 32 if tiny else 96
    return {
        "model.layout": "T",
        "model.depths": (5,),
        "model.widths": (width,),
        "model.strides": (1,),
        "model.stem": (width,),
        "model.stem_stride": 2 if tiny else 4,
    }
