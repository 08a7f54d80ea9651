# SPDX-License-Identifier: Apache-2.0
"""Focal Transformer on ImageNet-1k (arXiv 2107.00641, section 4.1): 300 epochs at 224.

    localglobal train --config configs/focal_imagenet.py:variant=tiny --workdir /data/runs/focal_t

The paper reports 82.2 / 83.6 / 84.0 % top-1 for tiny / small / base. Not run here.
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from localglobal_jax.config import recipes
from localglobal_jax.config.loading import parse_arg
from localglobal_jax.config.validation import unknown

BATCH = 1024  # images
# Section 4.1. The authors' yaml files have 0.3 for small and 0.5 for base: ``:source=code``
DROP_PATH = {
    "paper": {"tiny": 0.2, "small": 0.2, "base": 0.3},
    "code": {"tiny": 0.2, "small": 0.3, "base": 0.5},
}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant="tiny",
        source=tuple(DROP_PATH),
        resolution=224,  # pixels
        epochs=300,
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    config = recipes.imagenet(arg, steps=recipes.steps(arg.epochs, BATCH), batch_size=BATCH)
    size = arg.variant.split("_")[0]
    if size not in DROP_PATH[arg.source]:
        raise unknown("variant:", arg.variant, DROP_PATH[arg.source])
    config.model = dict(name=f"focal_{arg.variant}", drop_path=DROP_PATH[arg.source][size])
    config.task = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
    recipes.timm_randaugment(config)
    config.data.erase = 0.25
    config.optim = dict(
        learning_rate=1e-3,  # for a batch of 1,024; the authors' code scales it with the batch
        warmup_steps=min(recipes.steps(20, BATCH), config.steps),  # 20 epochs
        end_learning_rate=1e-5,
        weight_decay=0.05,
        clip_norm=5.0,
    )
    if arg.size == "tiny":
        recipes.shrink(config, depths=(1, 1, 1, 1), widths=(16, 32, 32, 32), heads=(2, 2, 2, 2))
        config.model.update(window=4, expand=(2, 2, 2, 2), image_size=64)
        config.optim.warmup_steps = 2
    return config
