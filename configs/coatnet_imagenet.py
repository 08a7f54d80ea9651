# SPDX-License-Identifier: Apache-2.0
"""CoAtNet on ImageNet-1k from scratch (arXiv 2106.04803, table 12; 300 epochs at 224).

    localglobal train --config configs/coatnet_imagenet.py:variant=0 --workdir /data/runs/coatnet_0

The paper reports 81.6 / 83.3 / 84.1 / 84.5 % top-1 for variants 0 / 1 / 2 / 3. Not run here.
``:dataset=imagenet21k,epochs=90`` or any other TFDS classification set pre-trains on that;
``:data=mock,size=tiny`` runs anywhere, in a minute, without data.
"""

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg

DROP_PATH = {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7, 4: 0.2, 5: 0.2}  # 4 and up: pre-trained on more
IMAGES = 1_281_167  # in the training split of imagenet2012


def get_config(arg=None):
    arg = parse_arg(
        arg,
        variant=0,
        resolution=224,
        epochs=300,
        dataset="imagenet2012",
        images=IMAGES,
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 4096
    config.steps = arg.epochs * arg.images // config.batch_size
    config.dtype = "bfloat16"
    config.model = ConfigDict(
        dict(name=f"coatnet_{arg.variant}", drop_path=DROP_PATH.get(arg.variant, 0.2))
    )
    config.task = ConfigDict(dict(label_smoothing=0.1, mixup=0.8))
    config.data = ConfigDict(
        dict(
            name=arg.dataset,
            mock=arg.data == "mock",
            train_split="train",
            eval_splits=("validation",),
            image_size=(arg.resolution, arg.resolution),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop="resized",
            flip=True,
            randaugment_layers=2,
            randaugment_magnitude=15,
            threads=16,
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1e-3,
            warmup_steps=10_000,
            end_learning_rate=1e-5,
            weight_decay=0.05,
            clip_norm=1.0,
        )
    )
    config.eval = ConfigDict(dict(every=5_000))
    config.checkpoint = ConfigDict(dict(every=1_000, best="validation/accuracy"))
    config.log = ConfigDict(dict(every=100))

    if arg.size == "tiny":
        config.steps, config.batch_size, config.dtype = 10, 8, "float32"
        config.data.image_size = (64, 64)
        config.model.update(depths=(1, 1, 1, 1), widths=(8, 16, 32, 64), stem=(8, 8))
        config.optim.warmup_steps = 2
        config.eval.every = config.checkpoint.every = config.log.every = 5
    return config
