# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters, over all families: nothing of them changes, and nothing is kept for them."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from localglobal_jax.checkpoints import reader
from localglobal_jax.config import loading, schema, validation
from localglobal_jax.data.images import device_ops
from localglobal_jax.parallel import context, placement
from localglobal_jax.training import freezing, loop, losses, optim
from localglobal_jax.training.setup import prepare_setup
from localglobal_jax.training.step import init_state, make_update
from localglobal_jax.training.tasks import create_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = "coatnet_digits.py:size=tiny,data=mock"
FSDP = {"strategy": "fsdp", "mesh": {"data": 1, "fsdp": 2}}
SMALL_VOLO = {
    "model.layout": "OS",
    "model.depths": "(1, 2)",
    "model.widths": "(24, 48)",
    "model.strides": "(1, 2)",
    "model.heads": "(2, 4)",
}
SMALL_FOCAL = {
    "model.layout": "FF",
    "model.depths": "(1, 2)",
    "model.widths": "(16, 32)",
    "model.heads": "(2, 2)",
    "model.expand": "(2, 2)",
    "model.levels": "(2, 2)",
    "model.focal_windows": "(3, 1)",
}
RUNS = {  # config, overrides, patterns, parallel
    "coatnet": (DIGITS, {"model.depths": "(3, 1)"}, "stem,stage1,!stage1/block3", {"scan": True}),
    "coatnet probe": (DIGITS, {}, "*,!head", {"compile": "pmap"}),
    "layout": (DIGITS, {"model.layout": "CA", "model.depths": "(2, 1)"}, "stage1/*", FSDP),
    "volo": ("volo_imagenet.py:size=tiny,data=mock", SMALL_VOLO, "*,!head/*", FSDP),
    "focal": ("focal_imagenet.py:size=tiny,data=mock", SMALL_FOCAL, "stem,stage[1]", {}),
    "muse": (
        "muse_lohelp.py:size=tiny,data=mock",
        {"model.depths": "(2, 1)"},
        "encoder,!encoder/layer2,embedding",
        FSDP,
    ),
}


def run_of(name):
    config, overrides, patterns, parallel = RUNS[name]
    options = {
        "optim.accumulate": "2",
        "optim.ema": "0.9",
        "optim.weight_decay": "0.5",
        "optim.warmup_steps": "0",
        "optim.freeze": patterns,
        "dtype": "float32",
    }
    run = validation.check(loading.load(str(CONFIGS / config), {**overrides, **options}))
    return run.model_copy(update={"parallel": schema.Parallel(**parallel)})


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {freezing.path_of(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_frozen_stays_and_has_no_moments(name):
    run = run_of(name)
    task, optimizer = create_task(run), optim.make_optimizer(run.optim, run.steps)
    before = jax.device_get(jax.jit(lambda: init_state(task, optimizer, run))())
    partitioner = placement.Partitioner(run.parallel)
    step = partitioner.compile_step(
        make_update(task, optimizer, run), jax.eval_shape(lambda: before)
    )
    state = partitioner.put(before)
    for batch in task.train_batches(0, 2):
        state, outcome = step(state, partitioner.train_batch(batch))

    first, last = flat(before.variables), flat(state.variables)
    average, moments = flat(state.average), flat(state.optimizer)
    params = [path.removeprefix("params/") for path in first if path.startswith("params/")]
    frozen = {path for path in params if freezing.is_frozen(path, run.optim.freeze)}
    assert 0 < len(frozen) < len(params)
    assert len(outcome.finite) == 1 + len(params) - len(frozen)
    for path in params:
        same = np.array_equal(first[f"params/{path}"], last[f"params/{path}"])
        assert same or path not in frozen, path
        assert not same or path in frozen or not path.endswith(("kernel", "scale")), path
        found = [key for key in moments if key.endswith(f"/{path}")]
        assert len(found) == (0 if path in frozen else 2), path
        if path in frozen:
            assert np.array_equal(average[f"params/{path}"], first[f"params/{path}"])
    for path in first:
        if path.startswith("batch_stats/"):
            norm = path.removeprefix("batch_stats/").rpartition("/")[0]
            same = np.array_equal(first[path], last[path])
            if path.endswith("/var") or f"{norm}/scale" in frozen:  # some means stay 0
                assert same == (f"{norm}/scale" in frozen), path
    assert first.keys() == last.keys() == average.keys()


@functools.cache
def digits():
    """One convolution block: its BatchNorms have moved averages."""
    given = {**small.IMAGES, "model.layout": "C", "model.drop_path": "0"}
    given |= {"task.label_smoothing": "0"}
    run = validation.check(loading.load(str(CONFIGS / DIGITS), given))
    task = create_task(run)
    variables = jax.jit(task.model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda x: x * rng.uniform(0.5, 2, x.shape) + rng.uniform(0, 0.2, x.shape),
        variables["batch_stats"],
    )
    batch = {k: jnp.asarray(v) for k, v in next(task.train_batches(0, 1)).items()}
    return run, task, {**variables, "batch_stats": jax.tree.map(jnp.float32, moved)}, batch


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_frozen_norm_is_that_of_evaluation(implementation):
    run, task, variables, batch = digits()
    marks = freezing.norm_marks(variables, ("*", "!head"))
    with context.implementation(implementation):
        found = task.loss({**variables, **marks}, batch, jax.random.key(0))
        image = device_ops.normalize(batch["image"], run.data)
        logits, _ = task.model.apply(variables, image, train=False)
    expected = losses.cross_entropy(logits, batch["label"]).sum()
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    trained = task.loss(variables, batch, jax.random.key(0)).total
    assert abs(trained - expected) > 0.01 * abs(expected)


@pytest.mark.parametrize("frozen", ["norm", "expand_norm", "depthwise_norm"])
def test_one_frozen_norm_among_others_is_the_same_in_the_fused_kernels(frozen):
    _, task, variables, batch = digits()
    marks = freezing.norm_marks(variables, (f"stage1/block1/{frozen}",))
    found = {}
    for implementation in ("reference", "fused"):
        with context.implementation(implementation):
            found[implementation] = task.loss({**variables, **marks}, batch, jax.random.key(0))
    first, second = flat(found["reference"]), flat(found["fused"])
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, rtol=2e-4, atol=2e-5, err_msg=path)


def test_a_run_says_what_it_trains_and_resumes_as_if_nothing_had_happened(tmp_path, caplog):
    overrides = {
        **small.IMAGES,
        "steps": "6",
        "optim.freeze": "*,!head",
        "optim.layer_decay": "0.8",
        "optim.warmup_steps": "1",
        "checkpoint.every": "3",
        "checkpoint.best": "None",
        "eval.every": "0",
    }
    run = validation.check(loading.load(str(CONFIGS / DIGITS), overrides))
    with caplog.at_level("INFO"):
        loop.train(run, tmp_path)
    params = prepare_setup(run, tmp_path).template.variables["params"]
    total = len(jax.tree.leaves(params))
    assert f"4 of {total} parameters trained (" in caplog.text
    _, whole, _ = reader.read(tmp_path)
    assert len(jax.tree.leaves(whole["optimizer"])) == 2 * 4 + 2  # two counts
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    loop.train(run, tmp_path)
    _, again, _ = reader.read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    other = loading.load(str(CONFIGS / DIGITS), {**overrides, "optim.freeze": "stem"})
    with pytest.raises(ValueError, match=r"optim\.freeze"):
        loop.train(other, tmp_path)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("stem/conv3", "stem/conv2"),
        ("steem", "stem"),
        ("attention,stem", "stage2/block1/attention"),
        ("stem|stage1", "optim.freeze"),
        ("Stem", "stem"),
        ("xyzzy", "stage1, stage2"),
        ("*", '"!"'),
        ("*,!head,head", '"!"'),
        ("stem,!stem", '"!"'),
        ("!head", '"!"'),
        ("stem,!haed", '"!haed"'),
    ],
)
def test_patterns_that_match_nothing_or_everything(patterns, message, tmp_path):
    run = validation.check(loading.load(str(CONFIGS / DIGITS), {"optim.freeze": patterns}))
    with pytest.raises(ValueError, match=r"optim\.freeze") as error:
        loop.train(run, tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [("stem", ""), 3, ("stem", 4), True])
def test_values_that_are_no_patterns(value):
    with pytest.raises(ValueError, match=r"config\.optim\.freeze"):
        validation.check({"model": {"name": "m"}, "optim": {"freeze": value}})


def test_a_config_written_before_the_field_existed(tmp_path):
    """It resumes: the guard of a workdir reads the field's default."""
    overrides = {"steps": "1", "checkpoint.best": "None", "optim.warmup_steps": "0"}
    overrides |= small.IMAGES
    run = validation.check(loading.load(str(CONFIGS / DIGITS), overrides))
    loop.train(run, tmp_path)
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    for field in ("freeze", "layer_decay"):
        del old["optim"][field]
    file.write_text(json.dumps(old))
    loop.train(run, tmp_path)
