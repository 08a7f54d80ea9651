# SPDX-License-Identifier: Apache-2.0
"""Layer-wise decay of the learning rate: the table of every family, by value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from localglobal_jax.config import schema, validation
from localglobal_jax.models.registry import create_model
from localglobal_jax.training import freezing, optim

IMAGE = (jax.ShapeDtypeStruct((2, 64, 64, 3), "float32"),)
TEXT = (jax.ShapeDtypeStruct((2, 8), "int32"),) * 2
WORDS = {"source_vocab": 20, "target_vocab": 20, "widths": (32, 32), "heads": (2, 2)}
WORDS["hidden"] = (32, 32)
# name: model, inputs, start of the path -> the number of its layer
TABLES = {
    "coatnet": (
        {"name": "coatnet", "depths": (1, 2, 1, 1), "widths": (8, 16, 32, 64), "stem": (8, 8)},
        IMAGE,
        {
            "stem/": 0,
            "stage1/block1/": 1,
            "stage2/block1/": 2,
            "stage2/block2/": 3,
            "stage3/block1/": 4,
            "stage4/block1/": 5,
            "head/": 6,
        },
    ),
    "coatnet_0": (
        {"name": "coatnet_0"},
        IMAGE,
        {
            "stem/": 0,
            **{f"stage1/block{i}/": i for i in (1, 2)},
            **{f"stage2/block{i}/": 2 + i for i in (1, 2, 3)},
            **{f"stage3/block{i}/": 5 + i for i in range(1, 6)},
            **{f"stage4/block{i}/": 10 + i for i in (1, 2)},
            "head/": 13,
        },
    ),
    "layout of twelve blocks": (  # block10 comes after block2
        {
            "name": "coatnet",
            "layout": ("CT", "T"),
            "depths": (12, 1),
            "widths": (32, 32),
            "stem": (32,),
            "stem_stride": 8,
        },
        IMAGE,
        {
            "stem/": 0,
            **{f"stage1/block{i}/": i for i in range(1, 13)},
            "stage2/block1/": 13,
            "head/": 14,
        },
    ),
    "volo": (
        {
            "name": "volo",
            "depths": (1, 2, 1, 1),
            "widths": (24, 48, 48, 48),
            "heads": (2, 4, 4, 4),
            "stem": 16,
        },
        IMAGE,
        {
            "stem/": 0,
            "position": 0,
            "head/class_token": 0,
            "stage1/block1/": 1,
            "downsample2/": 2,
            "stage2/block1/": 2,
            "stage2/block2/": 3,
            "stage3/block1/": 4,
            "stage4/block1/": 5,
            "head/block1/": 6,
            "head/block2/": 7,
            "head/norm/": 8,
            "head/classifier/": 8,
            "head/aux_classifier/": 8,
        },
    ),
    "focal": (
        {
            "name": "focal",
            "depths": (1, 2, 1, 1),
            "widths": (16, 32, 32, 32),
            "heads": (2, 2, 2, 2),
            "window": 4,
            "expand": (2, 2, 2, 2),
            "image_size": 64,
        },
        IMAGE,
        {
            "stem/": 0,
            "stage1/block1/": 1,
            "stage2/downsample/": 2,
            "stage2/block1/": 2,
            "stage2/block2/": 3,
            "stage3/": 4,
            "stage4/": 5,
            "head/": 6,
        },
    ),
    "muse": (
        {"name": "muse", "depths": (2, 3), **WORDS},
        TEXT,
        {
            "embedding/": 0,
            "encoder/layer1/": 1,
            "encoder/layer2/": 2,
            "decoder/layer1/": 3,
            "decoder/layer2/": 4,
            "decoder/layer3/": 5,
        },
    ),
    "muse, three tables and norms before": (
        {
            "name": "muse",
            "depths": (2, 1),
            "embeddings": "separate",
            "pre_norm": (True, True),
            **WORDS,
        },
        TEXT,
        {
            "source_embedding/": 0,
            "target_embedding/": 0,
            "encoder/layer1/": 1,
            "encoder/layer2/": 2,
            "encoder/norm/": 2,
            "decoder/layer1/": 3,
            "decoder/norm/": 4,
            "output_embedding/": 4,
        },
    ),
}

HEADS = {
    "coatnet": 6,
    "coatnet_0": 13,
    "layout of twelve blocks": 14,
    "volo": 8,
    "focal": 6,
    "muse": 6,  # whose logits share the table of the stem
    "muse, three tables and norms before": 4,
}


def shapes(model, inputs):
    module = create_model(**model)
    return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, train=False), *inputs)[
        "params"
    ]


@pytest.mark.parametrize("name", TABLES)
def test_the_number_and_the_rate_of_every_layer(name):
    model, inputs, table = TABLES[name]
    params = shapes(model, inputs)
    numbers, head = optim.layer_numbers(params)
    rates = jax.tree_util.tree_leaves_with_path(optim.layer_rates(params, 0.5))
    rates = {freezing.path_of(path): rate for path, rate in rates}
    assert head == HEADS[name]
    assert rates.keys() == numbers.keys()
    seen = set()
    for path, number in numbers.items():
        (start,) = (s for s in table if path.startswith(s))
        seen.add(start)
        assert number == table[start], path
        assert rates[path] == 0.5 ** (head - number), path
    assert seen == set(table)


def test_the_table_stays_where_parameters_are_frozen():
    model, inputs, _ = TABLES["coatnet"]
    params = shapes(model, inputs)
    some = freezing.trained(params, ("stage1", "stage2"))
    assert optim.layer_numbers(some) == optim.layer_numbers(params)
    assert len(jax.tree.leaves(optim.layer_rates(some, 0.5))) == len(jax.tree.leaves(some))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_and_decay_are_scaled(name):
    params = {
        "stem": {"kernel": jnp.ones((2, 2))},
        "stage1": {"block1": {"kernel": jnp.ones((2, 2))}, "block2": {"kernel": jnp.ones((2, 2))}},
        "head": {"kernel": jnp.ones((2, 2))},
    }
    found = []
    for decay in (1.0, 0.75):
        options = schema.Optim(
            name=name, schedule="constant", weight_decay=0.1, layer_decay=decay, clip_norm=0.0
        )
        optimizer = optim.make_optimizer(options, 10)
        state = optimizer.init(params)
        updates, state = jax.jit(optimizer.update)(params, state, params)
        found.append(updates)
        assert len(jax.tree.leaves(state)) == len(
            jax.tree.leaves(optim.make_optimizer(schema.Optim(name=name), 10).init(params))
        )
    rates = jax.tree.map(lambda a, b: float(np.mean(b / a)), *found)
    factors = [rates["stem"], *rates["stage1"].values(), rates["head"]]
    kernels = [factor["kernel"] for factor in factors]
    np.testing.assert_allclose(kernels, [0.75**3, 0.75**2, 0.75, 1], rtol=1e-6)


def test_a_model_without_numbered_blocks():
    params = {"dense": {"kernel": jnp.ones((2, 2))}}
    optimizer = optim.make_optimizer(schema.Optim(layer_decay=0.5), 10)
    with pytest.raises(ValueError, match=r"optim\.layer_decay"):
        optimizer.update(params, optimizer.init(params), params)
    assert isinstance(optim.make_optimizer(schema.Optim(), 10), optax.GradientTransformation)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, "0.5"])
def test_a_decay_out_of_bounds(value):
    with pytest.raises(ValueError, match=r"config\.optim\.layer_decay"):
        validation.check({"model": {"name": "m"}, "optim": {"layer_decay": value}})
