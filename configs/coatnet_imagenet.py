# SPDX-License-Identifier: Apache-2.0
"""CoAtNet from scratch, by the columns of table 10 (arXiv 2106.04803): ImageNet-1k, 21k, JFT.

    localglobal train --config configs/coatnet_imagenet.py:variant=0 --workdir /data/runs/coatnet_0

The paper reports 81.6 / 83.3 / 84.1 / 84.5 % top-1 for variants 0 / 1 / 2 / 3 at 224. Our blocks
stride in the depthwise convolution, the "Strided DConv" of its table 9: 82.0 / 83.5 / 84.1 % for
0 / 1 / 2, at 4.6 / 8.8 / 16.6 G multiply-adds. Not run here.
``:recipe=21k,variant=2,dataset=imagenet21k`` pre-trains, for as many steps as the set has images
(``images=N`` for a set that is not prepared yet); ``coatnet_finetune.py`` follows.
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from localglobal_jax.config import recipes
from localglobal_jax.config.coatnet_recipes import PRETRAINING
from localglobal_jax.config.loading import parse_arg

BATCH = 4096  # images
OTHER = dict(drop_path=0.2, learning_rate=5e-4)  # of variants that a column does not have


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant=0,
        recipe=tuple(PRETRAINING),
        resolution=224,  # pixels
        epochs=0,  # 0: of the recipe
        dataset="imagenet2012",
        images=0,  # in the training split of `dataset`; 0: see `recipes.images_of`
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    recipe = PRETRAINING[arg.recipe]

    def of(field):
        value = recipe[field]
        return value.get(arg.variant, OTHER[field]) if isinstance(value, dict) else value

    images = arg.images or recipes.images_of(arg.dataset, arg.size)
    steps = recipes.steps(arg.epochs or recipe["epochs"], BATCH, images)
    config = recipes.imagenet(arg, steps=steps, batch_size=BATCH, dataset=arg.dataset)
    layers, magnitude = of("randaugment")
    config.data.update(
        randaugment_layers=layers, randaugment_magnitude=magnitude, randaugment_scale="tf"
    )
    config.model = dict(name=f"coatnet_{arg.variant}", drop_path=of("drop_path"))
    config.task = {field: of(field) for field in ("loss", "label_smoothing", "mixup")}
    warmup = recipe.get("warmup_steps") or recipes.steps(recipe["warmup_epochs"], BATCH, images)
    config.optim = dict(
        learning_rate=of("learning_rate"),
        schedule=of("schedule"),
        warmup_steps=min(warmup, steps),
        end_learning_rate=1e-5,
        weight_decay=of("weight_decay"),
        clip_norm=1.0,
    )
    if arg.size == "tiny":
        recipes.shrink(config, depths=(1, 1, 1, 1), widths=(8, 16, 32, 64), stem=(8, 8))
        config.optim.warmup_steps = 2
    return config
