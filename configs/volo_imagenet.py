# SPDX-License-Identifier: Apache-2.0
"""VOLO on ImageNet-1k (arXiv 2106.13112): 300 epochs at 224.

    localglobal train --config configs/volo_imagenet.py:variant=d1 --workdir /data/runs/volo_d1

The paper reports 84.2 / 85.2 / 85.4 / 85.7 / 86.1 % top-1 for d1 to d5, with token labelling by
the label maps of a teacher (``--config.data.label_maps=FOLDER``, see data.md). Without maps every
token's label is that of its image: 83.8 % for d1, the authors say. Tokens are mixed. Not run here.
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from localglobal_jax.config import preprocessing, recipes
from localglobal_jax.config.loading import parse_arg

BATCH = 1024  # images
DROP_PATH = {"d1": 0.1, "d2": 0.2, "d3": 0.5, "d4": 0.5, "d5": 0.75}
# The commands of the authors' README, for a batch of 1,024; it has none for d4 and d5, which take
# the rate of the other large ones.
LEARNING_RATE = {"d1": 1.6e-3, "d2": 1e-3, "d3": 1e-3, "d4": 1e-3, "d5": 1e-3}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant=tuple(DROP_PATH),
        resolution=224,  # pixels
        epochs=300,
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    config = recipes.imagenet(arg, steps=recipes.steps(arg.epochs, BATCH), batch_size=BATCH)
    config.model = dict(
        name=f"volo_{arg.variant}", mix_token=True, drop_path=DROP_PATH[arg.variant]
    )
    config.task = dict(label_smoothing=0.1)
    recipes.timm_randaugment(config)
    authors = preprocessing.of_timm(f"volo_{arg.variant}_{arg.resolution}")
    published = arg.resolution in (224, 384, 448, 512)
    config.data.update(erase=0.25, eval_crop=authors["eval_crop"] if published else 1.0)
    config.optim = dict(
        learning_rate=LEARNING_RATE[arg.variant],
        warmup_steps=min(recipes.steps(20, BATCH), config.steps),  # 20 epochs
        end_learning_rate=1e-5,
        weight_decay=0.05,
        clip_norm=0.0,  # off, as is the average of parameters: main.py's defaults
    )
    if arg.size == "tiny":
        recipes.shrink(config, depths=(1, 1, 1, 1), widths=(24, 48, 48, 48), heads=(2, 4, 4, 4))
        config.model.stem = 16
        config.optim.warmup_steps = 2
    return config
