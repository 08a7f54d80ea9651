# SPDX-License-Identifier: Apache-2.0
"""Focal Transformer on ImageNet-1k (arXiv 2107.00641, section 4.1): 300 epochs at 224.

    localglobal train --config configs/focal_imagenet.py:variant=tiny --workdir /data/runs/focal_t

The paper reports 82.2 / 83.6 / 84.0 % top-1 for tiny / small / base. Not run here.
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg

DROP_PATH = {"tiny": 0.2, "small": 0.2, "base": 0.3}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant="tiny",
        resolution=224,
        epochs=300,
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.steps = arg.epochs * 1_281_167 // config.batch_size
    config.dtype = "bfloat16"
    size = arg.variant.split("_")[0]
    config.model = ConfigDict(dict(name=f"focal_{arg.variant}", drop_path=DROP_PATH[size]))
    config.task = ConfigDict(dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0))
    config.data = ConfigDict(
        dict(
            name="imagenet2012",
            mock=arg.data == "mock",
            eval_splits=("validation",),
            image_size=(arg.resolution, arg.resolution),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop="resized",
            flip=True,
            randaugment_layers=2,
            randaugment_magnitude=9,
            erase=0.25,
            threads=16,
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1e-3,
            warmup_steps=20 * 1_281_167 // config.batch_size,
            end_learning_rate=1e-5,
            weight_decay=0.05,
            clip_norm=5.0,
        )
    )
    config.eval = ConfigDict(dict(every=5_000))
    config.checkpoint = ConfigDict(dict(every=1_000, best="validation/accuracy"))
    config.log = ConfigDict(dict(every=100))

    if arg.size == "tiny":
        config.steps, config.batch_size, config.dtype = 10, 8, "float32"
        config.data.image_size = (64, 64)
        config.model.update(depths=(1, 1, 1, 1), widths=(16, 32, 32, 32), heads=(2, 2, 2, 2))
        config.model.update(window=4, expand=(2, 2, 2, 2), image_size=64)
        config.optim.warmup_steps = 2
        config.eval.every = config.checkpoint.every = config.log.every = 5
    return config
