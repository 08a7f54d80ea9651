# SPDX-License-Identifier: Apache-2.0
"""CoAtNet on ImageNet-1k from scratch (arXiv 2106.04803, table 10; 300 epochs at 224).

    localglobal train --config configs/coatnet_imagenet.py:variant=0 --workdir /data/runs/coatnet_0

The paper reports 81.6 / 83.3 / 84.1 / 84.5 % top-1 for variants 0 / 1 / 2 / 3. Not run here.
``:dataset=NAME,images=N,epochs=90`` pre-trains on a TFDS classification set of N images;
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from localglobal_jax.config import recipes
from localglobal_jax.config.loading import parse_arg

BATCH = 4096  # images
DROP_PATH = {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7}  # table 10, by variant; 4 and up, of 21k and JFT: 0.2


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant=0,
        resolution=224,  # pixels
        epochs=300,
        dataset="imagenet2012",
        images=recipes.IMAGES,  # in the training split of `dataset`
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    steps = recipes.steps(arg.epochs, BATCH, arg.images)
    config = recipes.imagenet(arg, steps=steps, batch_size=BATCH, dataset=arg.dataset)
    config.model = dict(name=f"coatnet_{arg.variant}", drop_path=DROP_PATH.get(arg.variant, 0.2))
    config.task = dict(label_smoothing=0.1, mixup=0.8)
    config.optim = dict(
        learning_rate=1e-3,
        warmup_steps=10_000,
        end_learning_rate=1e-5,
        weight_decay=0.05,
    )
    if arg.size == "tiny":
        recipes.shrink(config, depths=(1, 1, 1, 1), widths=(8, 16, 32, 64), stem=(8, 8))
        config.optim.warmup_steps = 2
    return config
