# SPDX-License-Identifier: Apache-2.0
"""CoAtNet on the 1,797 digits that scikit-learn ships: the first run, and the smoke test.

    localglobal train --config configs/coatnet_digits.py --workdir runs/digits

Expect at least 98 % on the 360 held-out digits, in less than three minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg
from localglobal_jax.config.sweeps import product


def get_config(arg=None):
    arg = parse_arg(arg, size=("demo", "tiny"), data=("real", "mock"))
    config = ConfigDict()
    config.steps = 500
    config.batch_size = 128  # images

    # 8x8 pixels: the stem keeps the grid, one convolution stage sees 8x8, one attention stage 4x4
    config.model = dict(name="coatnet", layout="CT", depths=(2, 2), widths=(48, 96))
    config.model.update(strides=(1, 2), stem=(24, 48), stem_stride=1, drop_path=0.1)
    config.model.blocks = dict(T=dict(head_width=24))
    config.task = dict(label_smoothing=0.1)
    config.data = dict(name="digits", mock=arg.data == "mock")
    config.data.update(image_size=(8, 8), crop="pad", pad=1)  # pixels
    config.optim = dict(learning_rate=2e-3, warmup_steps=50, weight_decay=0.05, ema=0.98)
    config.eval = dict(every=100)  # steps
    config.checkpoint = dict(every=100, best="test/accuracy")
    if arg.size == "tiny":
        config.update(steps=20, batch_size=32)
        config.model.update(depths=(1, 1), widths=(16, 32), stem=(8, 16))
        config.model.blocks.T.head_width = 16
        config.optim.warmup_steps = 5
        config.eval.every = config.checkpoint.every = 10
    return config


def sweep_layouts():
    """Attention or convolution in the second stage, at two rates, with three seeds: 12 runs."""
    layouts = {"model.layout": ("CC", "CT"), "optim.learning_rate": (2e-3, 8e-3)}
    return product(layouts, {"seed": range(3)})
