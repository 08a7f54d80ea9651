# SPDX-License-Identifier: Apache-2.0
"""VOLO on ImageNet-1k (arXiv 2106.13112): 300 epochs at 224.

    localglobal train --config configs/volo_imagenet.py:variant=d1 --workdir /data/runs/volo_d1

The paper reports 84.2 to 86.1 % top-1 for d1 to d5, with token labelling by the label maps of a
teacher; here every token's label is that of its image, and tokens are mixed. Not run here.
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg

DROP_PATH = {"d1": 0.1, "d2": 0.2, "d3": 0.5, "d4": 0.5, "d5": 0.75}


def get_config(arg=None):
    arg = parse_arg(
        arg, variant="d1", resolution=224, epochs=300, data=("real", "mock"), size=("full", "tiny")
    )
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.steps = arg.epochs * 1_281_167 // config.batch_size
    config.dtype = "bfloat16"
    config.model = ConfigDict(
        dict(name=f"volo_{arg.variant}", mix_token=True, drop_path=DROP_PATH[arg.variant])
    )
    config.task = ConfigDict(dict(label_smoothing=0.1, token_weight=0.5))
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
            learning_rate=1.6e-3,
            warmup_steps=20 * 1_281_167 // config.batch_size,
            end_learning_rate=1e-5,
            weight_decay=0.05,
            ema=0.99992,
        )
    )
    config.eval = ConfigDict(dict(every=5_000))
    config.checkpoint = ConfigDict(dict(every=1_000, best="validation/accuracy"))
    config.log = ConfigDict(dict(every=100))

    if arg.size == "tiny":
        config.steps, config.batch_size, config.dtype = 10, 8, "float32"
        config.data.image_size = (64, 64)
        config.model.update(depths=(1, 1, 1, 1), widths=(24, 48, 48, 48), heads=(2, 4, 4, 4))
        config.model.stem = 16
        config.optim.warmup_steps = 2
        config.eval.every = config.checkpoint.every = config.log.every = 5
    return config
