# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a converted CoAtNet on your own pictures: a folder with one folder per class.

    localglobal convert timm coatnet_0_rw_224.safetensors --out runs/coatnet_0_rw
    localglobal prepare --config configs/finetune_folder.py --config.data.dir=PICTURES
    localglobal train --config configs/finetune_folder.py:init=runs/coatnet_0_rw \\
        --config.data.dir=PICTURES --workdir runs/mine

`prepare` counts the pictures of every class and names the damaged files. PICTURES holds CLASS/FILE,
or train/CLASS/FILE and validation/CLASS/FILE; without those, a tenth of the pictures is for
validation, another for testing. Without ``init=`` a CoAtNet-0 starts from random parameters, and
with ``:size=tiny`` a model of 0.1 M parameters: ten steps at 64 pixels, unless ``steps=`` and
``resolution=`` are given. ``:data=mock,size=tiny`` needs no pictures.
"""

import pathlib

from localglobal_jax.config.loading import import_file, parse_arg

coatnet_finetune = import_file(pathlib.Path(__file__).with_name("coatnet_finetune.py"))


def get_config(arg=None):
    arg = parse_arg(
        arg, init="", resolution=0, steps=0, data=("real", "mock"), size=("full", "tiny")
    )
    resolution, steps = (64, 10) if arg.size == "tiny" else (224, 1000)  # pixels, steps
    arg.update(resolution=arg.resolution or resolution, steps=arg.steps or steps)
    dataset = "folder" if arg.data == "real" else "cifar10"
    config = coatnet_finetune.finetune(arg, arg.steps, dataset)
    config.update(steps=arg.steps)  # also those given with ``size=tiny``
    config.data.image_size = (arg.resolution, arg.resolution)
    config.task.mixup = 0.0  # the paper's recipe is for a million pictures; this for hundreds
    config.data.update(randaugment_magnitude=9, area=(0.3, 1.0), threads=4)
    if arg.size == "full":
        config.update(batch_size=32, dtype="float32")
        config.optim.update(warmup_steps=arg.steps // 20, schedule="cosine", ema=0.99)
        config.eval.every = config.checkpoint.every = 100  # steps
    return config
