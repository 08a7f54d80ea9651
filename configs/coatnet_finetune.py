# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a CoAtNet at another resolution or on other classes (arXiv 2106.04803, table 12).

    localglobal convert timm coatnet_0_rw_224.safetensors --out runs/coatnet_0_rw
    localglobal train --config configs/coatnet_finetune.py:init=runs/coatnet_0_rw,resolution=384 \\
        --workdir runs/finetuned --config.data.name=DATASET

The model is the one of the checkpoint; relative tables are resized bilinearly, and where the number
of classes differs the classifier starts at zero. The paper: 30 epochs, batch 512, constant rate.
``:data=mock,size=tiny`` starts from nothing and runs anywhere.
"""

import json
import pathlib

from ml_collections import ConfigDict

from localglobal_jax.config.loading import parse_arg
from localglobal_jax.config.values import tuples


def get_config(arg=None):
    arg = parse_arg(
        arg,
        init="",
        resolution=384,
        steps=75_000,
        dataset="imagenet2012",
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    config = ConfigDict()
    config.seed = 0
    config.steps = arg.steps
    config.batch_size = 512
    config.dtype = "bfloat16"
    config.model = ConfigDict(dict(name="coatnet_0"))
    if arg.init:
        config.init = arg.init
        config.model = ConfigDict(model_of(arg.init))
    config.model.drop_path = 0.1
    config.task = ConfigDict(dict(label_smoothing=0.1, mixup=0.8))
    config.data = ConfigDict(
        dict(
            name=arg.dataset,
            mock=arg.data == "mock",
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
        dict(learning_rate=5e-5, schedule="constant", weight_decay=1e-8, ema=0.9999)
    )
    config.eval = ConfigDict(dict(every=2_500))
    config.checkpoint = ConfigDict(dict(every=500, best="validation/accuracy"))
    if arg.size == "tiny":
        config.steps, config.batch_size, config.dtype = 10, 8, "float32"
        config.data.image_size = (64, 64)
        if not arg.init:
            config.model.update(depths=(1, 1, 1, 1), widths=(8, 16, 32, 64), stem=(8, 8))
        config.eval.every = config.checkpoint.every = 5
    return config


def model_of(path):
    """The model section that a checkpoint was trained or converted with, but for its classes."""
    (file,) = sorted(pathlib.Path(path).glob("checkpoints/*/metadata/metadata"))[-1:] or (None,)
    if file is None:
        raise ValueError(f"init={path} is no workdir with checkpoints")
    model = json.loads(file.read_text())["metadata"]["model"]
    return {key: tuples(value) for key, value in model.items() if key not in ("classes", "dtype")}
