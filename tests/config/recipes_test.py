# SPDX-License-Identifier: Apache-2.0
"""The recipes are the papers', field by field.

The tables here are copies of the papers' and of the authors' code, not of the configs.
"""

import json
import pathlib

import pytest

from localglobal_jax.config import coatnet_recipes, loading, recipes, validation
from localglobal_jax.models import coatnet_variants
from localglobal_jax.training import optim

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
IMAGENET, IMAGENET_21K = 1_281_167, 13_000_000


def fields(run, names):
    """Returns the values of ``section.field`` names."""
    found = {}
    for name in names:
        value = run
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        found[name] = value
    return found


def check(spec, expected):
    run = validation.check(loading.load(f"{CONFIGS}/{spec}"))
    assert fields(run, expected) == expected


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


# arXiv 2106.04803, table 10
PRETRAIN = {
    "1k": {
        "data.randaugment_layers": 2,
        "data.randaugment_magnitude": 15,
        "data.randaugment_scale": "tf",
        "data.randaugment_probability": 1.0,
        "task.mixup": 0.8,
        "task.cutmix": 0.0,
        "task.loss": "softmax",
        "task.label_smoothing": 0.1,
        "steps": 300 * IMAGENET // 4096,
        "batch_size": 4096,
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "optim.end_learning_rate": 1e-5,
        "optim.warmup_steps": 10_000,
        "optim.schedule": "cosine",
        "optim.weight_decay": 0.05,
        "optim.clip_norm": 1.0,
        "optim.ema": 0.0,
    },
    "21k": {
        "data.randaugment_layers": 0,
        "task.mixup": 0.0,
        "task.cutmix": 0.0,
        "task.loss": "sigmoid",
        "task.label_smoothing": 0.0001,
        "steps": 285_644,
        "batch_size": 4096,
        "optim.learning_rate": 1e-3,
        "optim.end_learning_rate": 1e-5,
        "optim.warmup_steps": 5 * IMAGENET_21K // 4096,
        "optim.schedule": "linear",
        "optim.weight_decay": 0.01,
        "optim.clip_norm": 1.0,
        "optim.ema": 0.0,
    },
    "jft": {
        "task.mixup": 0.0,
        "task.cutmix": 0.0,
        "task.loss": "sigmoid",
        "steps": 14 * 300_000_000 // 4096,
        "batch_size": 4096,
        "optim.end_learning_rate": 1e-5,
        "optim.warmup_steps": 20_000,
        "optim.schedule": "linear",
        "optim.weight_decay": 0.01,
        "optim.clip_norm": 1.0,
        "optim.ema": 0.0,
    },
}
DROP_PATH = {
    "1k": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
    "21k": {2: 0.3, 3: 0.5, 4: 0.7},
    "jft": {3: 0.0, 4: 0.1, 5: 0.0},
}
SETS = {
    "1k": "",
    "21k": ",dataset=imagenet21k",
    "jft": ",dataset=imagenet21k,images=300000000",
}


@pytest.mark.parametrize(
    ("recipe", "variant"), [(r, v) for r, rates in DROP_PATH.items() for v in rates]
)
def test_coatnet_from_scratch(recipe, variant):
    expected = {**PRETRAIN[recipe], "model.drop_path": DROP_PATH[recipe][variant]}
    expected["model.name"] = f"coatnet_{variant}"
    check(f"coatnet_imagenet.py:recipe={recipe},variant={variant}{SETS[recipe]}", expected)


FINETUNE = {
    "1k": {"batch_size": 512, "task.mixup": 0.8, "steps": 30 * IMAGENET // 512},
    "21k": {"batch_size": 1024, "task.mixup": 0.0, "steps": 30 * IMAGENET // 1024},
    "jft": {"batch_size": 512, "task.mixup": 0.0, "steps": 30 * IMAGENET // 512},
}
FINETUNE_DROP_PATH = {
    "1k": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
    "21k": {2: 0.3, 3: 0.5, 4: 0.7},
    "jft": {3: 0.1, 4: 0.3, 5: 0.2},
}
ALL = {
    "data.eval_crop": "squash",  # no centre crop
    "task.loss": "softmax",
    "task.label_smoothing": 0.1,
    "data.randaugment_layers": 2,
    "data.randaugment_scale": "tf",
    "optim.learning_rate": 5e-5,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.weight_decay": 1e-8,
    "optim.clip_norm": 1.0,
    "optim.ema": 0.9999,
}


def checkpoint(folder, model):
    """A workdir with so much of a checkpoint as the config reads."""
    file = folder / "checkpoints/1/metadata/metadata"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"metadata": {"model": {"name": "coatnet", **model}}}))
    return folder


@pytest.mark.parametrize(
    ("recipe", "variant"), [(r, v) for r, rates in FINETUNE_DROP_PATH.items() for v in rates]
)
def test_coatnet_fine_tuned_from_a_checkpoint(recipe, variant, tmp_path):
    """The checkpoint has the fields of the module, not the name of the size."""
    spec = coatnet_variants.PAPER[f"coatnet_{variant}"]
    init = checkpoint(tmp_path / "run", {k: spec[k] for k in ("depths", "widths", "stem")})
    magnitude = 20 if (recipe, variant) == ("1k", 3) else {"1k": 15}.get(recipe, 5)
    expected = {**ALL, **FINETUNE[recipe], "data.randaugment_magnitude": magnitude}
    expected["model.drop_path"] = FINETUNE_DROP_PATH[recipe][variant]
    check(f"coatnet_finetune.py:recipe={recipe},init={init}", expected)


def test_a_size_that_the_paper_does_not_have_keeps_a_rate_of_its_own(tmp_path):
    model = {"depths": (3, 4, 6, 3), "widths": (64, 128, 256, 512)}  # timm's nano
    init = checkpoint(tmp_path / "run", model)
    check(f"coatnet_finetune.py:init={init}", {"model.drop_path": 0.1})


def test_the_table_of_sizes_is_that_of_the_models():
    for number, (depths, widths) in coatnet_recipes.SIZES.items():
        spec = coatnet_variants.PAPER[f"coatnet_{number}"]
        assert (spec["depths"], spec["widths"]) == (depths, widths)
    assert coatnet_recipes.size_of({"name": "coatnet_7"}) == 7
    assert coatnet_recipes.size_of({"name": "coatnet_0_rw"}) is None


TIMM = {  # rand-m9-mstd0.5-inc1
    "data.randaugment_layers": 2,
    "data.randaugment_magnitude": 9,
    "data.randaugment_scale": "timm",
    "data.randaugment_probability": 0.5,
    "data.randaugment_noise": 0.5,
}
# README and main.py of sail-sg/volo
VOLO = {
    **TIMM,
    "batch_size": 1024,
    "steps": 300 * IMAGENET // 1024,
    "task.label_smoothing": 0.1,
    "data.erase": 0.25,
    "optim.name": "adamw",
    "optim.end_learning_rate": 1e-5,
    "optim.warmup_steps": 20 * IMAGENET // 1024,
    "optim.schedule": "cosine",
    "optim.weight_decay": 0.05,
    "optim.clip_norm": 0.0,
    "optim.ema": 0.0,
    "model.mix_token": True,
    "task.token_weight": 0.5,
}


@pytest.mark.parametrize(
    ("variant", "rate", "drop_path"), [("d1", 1.6e-3, 0.1), ("d2", 1e-3, 0.2), ("d3", 1e-3, 0.5)]
)
def test_volo(variant, rate, drop_path):
    expected = {**VOLO, "optim.learning_rate": rate, "model.drop_path": drop_path}
    check(f"volo_imagenet.py:variant={variant}", expected)


@pytest.mark.parametrize(
    ("variant", "resolution", "crop"),
    [("d1", 224, 0.96), ("d1", 384, 1.0), ("d4", 448, 1.15), ("d5", 512, 1.15), ("d3", 448, 1.0),
     ("d1", 256, 1.0)],
)  # fmt: skip
def test_volo_sees_so_much_of_an_image(variant, resolution, crop):
    spec = f"volo_imagenet.py:variant={variant},resolution={resolution}"
    check(spec, {"data.eval_crop": crop})


@pytest.mark.parametrize("name", ["coatnet", "volo", "focal"])
def test_a_short_run_warms_up_no_longer_than_it_is(name):
    config = loading.load(f"{CONFIGS}/{name}_imagenet.py:epochs=3")
    assert config.optim.warmup_steps <= config.steps
    optim.make_schedule(validation.check(config).optim, config.steps)


def test_a_focal_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"large.*base, small, tiny"):
        loading.load(f"{CONFIGS}/focal_imagenet.py:variant=large")


# arXiv 2107.00641, section 4.1, and the yaml files of microsoft/Focal-Transformer
FOCAL = {
    **TIMM,
    "batch_size": 1024,
    "steps": 300 * IMAGENET // 1024,
    "task.label_smoothing": 0.1,
    "task.mixup": 0.8,
    "task.cutmix": 1.0,
    "data.erase": 0.25,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 20 * IMAGENET // 1024,
    "optim.schedule": "cosine",
    "optim.weight_decay": 0.05,
    "optim.clip_norm": 5.0,
}


@pytest.mark.parametrize(
    ("source", "variant", "drop_path"),
    [
        ("paper", "tiny", 0.2),
        ("paper", "small", 0.2),
        ("paper", "base", 0.3),
        ("code", "tiny", 0.2),
        ("code", "small", 0.3),
        ("code", "base", 0.5),
    ],
)
def test_focal(source, variant, drop_path):
    expected = {**FOCAL, "model.drop_path": drop_path}
    check(f"focal_imagenet.py:source={source},variant={variant}", expected)


# arXiv 1911.09483, section 3.1 and the flags of the published code
MUSE = {
    "muse_iwslt14.py": {
        "batch_size": 4 * 4_000,
        "steps": 20_000,
        "optim.learning_rate": 1e-3,
        "optim.schedule": "rsqrt",
        "optim.warmup_steps": 4_000,
        "optim.init_learning_rate": 1e-7,
        "optim.b1": 0.9,
        "optim.b2": 0.98,
        "optim.weight_decay": 1e-4,
        "optim.clip_norm": 0.0,
        "optim.accumulate": 4,
        "task.label_smoothing": 0.1,
        "task.beam": 5,
        "task.length_penalty": 1.0,
        "checkpoint.keep": 10,
    },
    "muse_wmt14.py:pair=en-de": {
        "batch_size": 3_584 * 32 * 4,
        "steps": 30_000,
        "optim.learning_rate": 1e-3,
        "optim.schedule": "cosine",
        "optim.warmup_steps": 10_000,
        "optim.init_learning_rate": 1e-7,
        "optim.b2": 0.98,
        "optim.clip_norm": 0.0,
        "task.label_smoothing": 0.1,
        "task.beam": 4,
        "task.length_penalty": 0.6,
    },
    "muse_wmt14.py:pair=en-fr": {
        "batch_size": 5_120 * 32 * 4,
        "steps": 80_000,
        "optim.learning_rate": 7e-4,
        "optim.schedule": "cosine",
        "optim.warmup_steps": 10_000,
        "task.beam": 5,
        "task.length_penalty": 0.8,
    },
}


@pytest.mark.parametrize("spec", MUSE)
def test_muse(spec):
    check(spec, MUSE[spec])


# ------------------------------------------------------------------- steps of a data set's size


def prepared(root, name, version, lengths):
    folder = root / name / version
    folder.mkdir(parents=True)
    splits = [
        {"name": "validation", "shardLengths": ["7"]},
        {"name": "train", "shardLengths": [str(n) for n in lengths]},
    ]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))


def test_a_prepared_set_tells_its_own_size(tmp_path):
    prepared(tmp_path, "imagenet21k", "1.0.0", [5_000, 3_192])
    assert recipes.images_of("imagenet21k") == 8_192
    check("coatnet_imagenet.py:dataset=imagenet21k,epochs=90", {"steps": 180})
    check("coatnet_imagenet.py:dataset=imagenet21k,images=40960,epochs=90", {"steps": 900})
    prepared(tmp_path, "photos", "2.0.0", [4_096])
    check("coatnet_imagenet.py:dataset=photos,epochs=3", {"steps": 3, "optim.warmup_steps": 3})
    check("coatnet_finetune.py:dataset=photos", {"steps": 30 * 8})
    assert recipes.images_of("photos:2.0.0") == 4_096
    prepared(tmp_path, "photos", "10.0.0", [8_192])
    assert recipes.images_of("photos") == 8_192
    prepared(tmp_path, "photos", "incomplete.9XY7_11.0.0", [7])
    assert recipes.images_of("photos") == 8_192
    for content in ("", "[]", '{"splits": 3}'):
        (tmp_path / "photos" / "10.0.0" / "dataset_info.json").write_text(content)
        with pytest.raises(ValueError, match=r"photos/10.0.0/dataset_info.json is damaged"):
            recipes.images_of("photos")


@pytest.mark.parametrize("config", ["coatnet_imagenet.py", "coatnet_finetune.py"])
def test_a_set_of_unknown_size(config):
    with pytest.raises(ValueError, match="dataset=photos"):
        loading.load(f"{CONFIGS}/{config}:dataset=photos")
    check(f"{config}:dataset=photos,size=tiny", {"steps": 10, "data.name": "photos"})


def test_a_set_that_is_not_prepared_has_the_size_of_its_paper():
    assert recipes.images_of("imagenet21k") == IMAGENET_21K
    check("coatnet_imagenet.py:dataset=imagenet21k,epochs=90", {"steps": 285_644})
    check("coatnet_finetune.py:dataset=cifar10", {"steps": 30 * 50_000 // 512})
    check("coatnet_finetune.py:dataset=photos,steps=77", {"steps": 77})


def test_steps_and_resolution_of_a_small_run_on_a_folder():
    default = {"steps": 10, "batch_size": 8, "data.image_size": (64, 64)}
    check("finetune_folder.py:size=tiny", default)
    given = {"steps": 6, "batch_size": 8, "data.image_size": (32, 32)}
    check("finetune_folder.py:size=tiny,steps=6,resolution=32", given)
    check("finetune_folder.py", {"steps": 1000, "data.image_size": (224, 224)})


@pytest.mark.parametrize("config", ["coatnet_imagenet.py", "coatnet_finetune.py"])
@pytest.mark.parametrize(
    ("dataset", "split"),
    [("imagenet2012", "validation"), ("cifar10", "test"), ("cifar100:3.0.2", "test"),
     ("fashion_mnist", "test"), ("places365_small", "validation")],
)  # fmt: skip
def test_a_set_is_evaluated_on_a_split_that_it_has(config, dataset, split):
    found = loading.load(f"{CONFIGS}/{config}:dataset={dataset},size=tiny")
    assert found.data.eval_splits == (split,)
    assert found.checkpoint.best == f"{split}/accuracy"
