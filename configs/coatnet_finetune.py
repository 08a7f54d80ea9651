# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a CoAtNet at another resolution or on other classes (arXiv 2106.04803, table 10).

    localglobal convert timm coatnet_0_rw_224.safetensors --out runs/coatnet_0_rw
    S=init=runs/coatnet_0_rw,resolution=384,dataset=DATASET
    localglobal train --config configs/coatnet_finetune.py:$S --workdir runs/finetuned

The model is that of the checkpoint, and so are mean, std, evaluation's crop and interpolation.
Relative tables are resized bilinearly; a classifier is kept if the names of its classes are those
of the data, else it starts at zero. The paper: 30 epochs, constant rate; by the set of the
pre-training (``:recipe=21k``) other batches, drop rates and augmentation.
``:data=mock,size=tiny`` starts from random parameters and runs anywhere.
"""

from localglobal_jax.config import preprocessing, recipes
from localglobal_jax.config.coatnet_recipes import FINETUNING, size_of
from localglobal_jax.config.loading import parse_arg
from localglobal_jax.config.values import tuples

DROP_PATH = 0.1  # of sizes that are not in the paper's table, such as timm's
EPOCHS = 30


def get_config(arg=None):
    arg = parse_arg(
        arg,
        init="",
        recipe=tuple(FINETUNING),
        resolution=384,  # pixels
        steps=0,  # 0: 30 epochs of `dataset`
        dataset="imagenet2012",
        data=("real", "mock"),
        size=("full", "tiny"),
    )
    recipe = FINETUNING[arg.recipe]
    batch = recipe["batch_size"]
    steps = arg.steps or recipes.steps(EPOCHS, batch, recipes.images_of(arg.dataset, arg.size))
    config = finetune(arg, steps=steps, dataset=arg.dataset)
    size = size_of(config.model.to_dict())
    config.model.drop_path = recipe["drop_path"].get(size, DROP_PATH)
    magnitude = recipe["randaugment"].get(size, recipe["magnitude"])
    config.data.update(randaugment_magnitude=magnitude, randaugment_scale="tf")
    if size is not None:  # the paper evaluates without a centre crop
        config.data.eval_crop = "squash"
    config.task.mixup = recipe["mixup"]
    if arg.size == "full":
        config.batch_size = batch
    return config


def finetune(arg, steps, dataset):
    """Returns the config of fine-tuning `arg.init`; `configs/finetune_folder.py` calls it too."""
    config = recipes.imagenet(arg, steps=steps, batch_size=512, dataset=dataset)
    config.model = {"name": "coatnet_0"}
    if arg.init:
        config.init, metadata = arg.init, metadata_of(arg.init)
        config.model = model_of(metadata)
        found = preprocessing.of_checkpoint(metadata)  # at another size all but the size
        config.data.update({name: value for name, value in found.items() if name != "image_size"})
    config.model.drop_path = 0.1
    config.task = dict(label_smoothing=0.1, mixup=0.8)
    config.optim = dict(learning_rate=5e-5, schedule="constant", weight_decay=1e-8, ema=0.9999)
    config.eval.every = 2_500  # steps: an epoch of ImageNet-1k
    config.checkpoint.every = 500
    if arg.size == "tiny":
        small = dict(depths=(1, 1, 1, 1), widths=(8, 16, 32, 64), stem=(8, 8))
        recipes.shrink(config, **({} if arg.init else small))
    config.log.every = 50
    return config


def metadata_of(path):
    """Returns the metadata of a checkpoint, without reading its arrays."""
    from localglobal_jax.inference import load  # noqa: PLC0415 # imports jax

    try:
        return load.read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"init={path}: {error}") from error


def model_of(metadata):
    """Returns the ``model`` section of a checkpoint, without its number of classes and dtype."""
    model = metadata["model"]
    return {key: tuples(value) for key, value in model.items() if key not in ("classes", "dtype")}
