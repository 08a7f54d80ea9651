# SPDX-License-Identifier: Apache-2.0
"""Another resolution, another number of classes."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from localglobal_jax.convert import adapt
from localglobal_jax.models.registry import create_model

TINY = {
    "classes": 3,
    "layout": "CT",
    "depths": (1, 2),
    "widths": (8, 16),
    "stem": (4, 8),
    "blocks": {"T": {"head_width": 8}},
}


@cache
def initialised(module):
    x = jnp.zeros((1, 32, 32, 3))
    return jax.jit(lambda: module.init(jax.random.key(0), x, train=False))()


@partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
    return module.apply(variables, x, train=False)


def tiny(**fields):
    module = create_model("coatnet", **{**TINY, **fields})
    return module, initialised(module)


def bilinear(table, height, width):
    """tf.image.resize's rule, written out: half-pixel centres, edges repeated, no antialiasing."""
    out = table
    for axis, new in enumerate((height, width)):
        old = out.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        out = out.take(low, axis) * (1 - part) + out.take(high, axis) * part
    return out


@pytest.mark.parametrize("size", [(48, 48), (64, 32), (24, 40), (32, 8)])
def test_tables_are_resized_bilinearly_and_nothing_else(size):
    module, variables = tiny()
    resized = adapt.resize(module, variables, size)
    before, after = (traverse_util.flatten_dict(tree, sep="/") for tree in (variables, resized))
    tables = [name for name in before if name.endswith("relative_bias/table")]
    assert len(tables) == 2
    for name in before:
        if name not in tables:
            assert after[name] is before[name]
            continue
        h, w = (2 * (n // 8) - 1 for n in size)
        old = np.asarray(before[name])
        np.testing.assert_allclose(after[name], bilinear(old, h, w), atol=1e-6)
        # displacement zero stays displacement zero
        np.testing.assert_allclose(after[name][h // 2, w // 2], old[3, 3], atol=1e-6)
    logits, _ = apply(module, resized, jnp.ones((2, *size, 3)))
    assert logits.shape == (2, 3)


def test_the_same_size_changes_nothing():
    module, variables = tiny()
    resized = adapt.resize(module, variables, (32, 32))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, variables, resized))


def test_a_bias_made_by_an_mlp_needs_no_resizing():
    module, variables = tiny(blocks={"T": {"head_width": 8, "bias": "mlp", "bias_hidden": 4}})
    resized = adapt.resize(module, variables, (64, 48))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, variables, resized))


def test_grey_models_are_resized_and_other_channels_refused():
    module, _ = tiny()
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    resized = adapt.resize(module, variables, (64, 64))
    assert resized["params"]["stem"]["conv1"]["kernel"].shape[2] == 1
    with pytest.raises(ValueError, match="channels=4"):
        adapt.recolour(variables, 4)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Conv(4, (3, 3), name="first")(x)

    own = Own().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    assert jax.tree.structure(adapt.resize(Own(), own, (16, 16))) == jax.tree.structure(own)
    with pytest.raises(ValueError, match="no convolution"):
        adapt.recolour({"params": {"classifier": {"bias": jnp.zeros(3)}}}, 1)


def test_what_cannot_be_resized_is_named():
    module, variables = tiny()
    with pytest.raises(ValueError, match=r"head/classifier/bias .*\(3,\)"):
        adapt.resize(module.clone(classes=4), variables, (32, 32))
    with pytest.raises(ValueError, match="stage1/block2"):
        adapt.resize(create_model("coatnet_0"), variables, (32, 32))


@pytest.mark.parametrize("classes", [7, 1])
def test_a_new_classifier_is_zero_and_learns(classes):
    module, variables = adapt.reclassify(*tiny(), classes)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    def loss(params):
        logits, _ = apply(module, {**variables, "params": params}, x)
        return logits[:, 0].sum(), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    np.testing.assert_array_equal(logits, np.zeros((2, classes)))
    assert np.abs(gradient["head"]["classifier"]["kernel"][:, 0]).max() > 0


def test_no_classifier_gives_the_features():
    old, variables = tiny()
    module, headless = adapt.reclassify(old, variables, 0)
    x = jnp.ones((1, 32, 32, 3))
    _, intermediates = apply(old, variables, x)
    out, _ = apply(module, headless, x)
    np.testing.assert_allclose(out, intermediates["features"], atol=1e-6)
    with pytest.raises(ValueError, match="classifier"):
        adapt.reclassify(module, headless, 5)


@pytest.mark.parametrize("name", ["coatnet", "volo", "focal"])
def test_weights_of_one_channel_and_of_three_give_the_same_logits_of_grey_images(name):
    given = {
        "coatnet": TINY,
        "volo": dict(
            layout="OS",
            depths=(1, 1),
            widths=(16, 16),
            strides=(1, 1),
            heads=(2, 2),
            stem=4,
            classes=3,
        ),
        "focal": dict(
            layout="F",
            depths=(1,),
            widths=(16,),
            heads=(2,),
            window=4,
            expand=(1,),
            levels=(1,),
            focal_windows=(3,),
            image_size=32,
            classes=3,
        ),
    }[name]
    module = create_model(name, **given)
    variables = initialised(module)
    grey = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))
    expected, _ = apply(module, variables, grey.repeat(3, 3))
    one, change = adapt.recolour(variables, 1)
    assert "summed" in change
    found, _ = apply(module, one, grey)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    back, change = adapt.recolour(one, 3)
    assert "repeated" in change
    np.testing.assert_allclose(apply(module, back, grey.repeat(3, 3))[0], expected, atol=1e-5)
    same, change = adapt.recolour(variables, 3)
    assert not change and jax.tree.all(jax.tree.map(lambda a, b: a is b, dict(variables), same))


def test_classes_that_are_not_there_cannot_be_chosen():
    module, variables = tiny()
    for rows in ([0, 3], [-1], [12]):
        with pytest.raises(ValueError, match=r"rows=.* classes 0 to 2"):
            adapt.choose_classes(module, variables, rows)
    headless, backbone = adapt.reclassify(module, variables, 0)
    with pytest.raises(ValueError, match="classifier"):
        adapt.choose_classes(headless, backbone, [0])


@pytest.mark.parametrize("furthest", [4, 16])
def test_biases_of_displacements_stay_those_of_their_displacement(furthest):
    """Between tokens they are cut or repeated at their ends, as the operator does."""
    fields = {"layout": "TT", "depths": (1, 1), "widths": (16, 16), "heads": (2, 2)}
    fields |= {"hidden": (16, 16), "source_vocab": 20, "target_vocab": 20}
    old, new = (
        create_model("muse", **fields, blocks={"T": {"furthest": n}}) for n in (8, furthest)
    )
    tokens = jax.ShapeDtypeStruct((1, 6), jnp.int32)
    ids = jnp.arange(4, 10)[None]
    variables = jax.jit(old.init)(jax.random.key(0), ids, ids)
    displacements = jnp.tile(jnp.arange(-8.0, 9)[:, None], (1, 2))
    flat = traverse_util.flatten_dict(variables)
    tables = [path for path in flat if path[-2:] == adapt.DISPLACEMENTS]
    flat |= dict.fromkeys(tables, displacements)
    found = adapt.fit(new, traverse_util.unflatten_dict(flat), tokens, tokens)
    expected = jnp.clip(jnp.arange(-furthest, furthest + 1), -8, 8)
    for path in tables:
        table = traverse_util.flatten_dict(found)[path]
        np.testing.assert_array_equal(table, jnp.tile(expected[:, None], (1, 2)))
    if furthest > 8:
        one, other = (m.apply(v, ids, ids)[0] for m, v in (
            (old, traverse_util.unflatten_dict(flat)), (new, found)))  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_size_may_be_one_number_and_classes_are_some():
    module, variables = tiny()
    one, other = (adapt.resize(module, variables, size) for size in (48, (48, 48)))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    with pytest.raises(ValueError, match="reclassify"):
        adapt.choose_classes(module, variables, [])


def test_variables_of_another_depth_are_listed_by_side_and_not_all():
    module, _ = tiny(depths=(4, 4))
    with pytest.raises(ValueError, match=r"it needs .* and \d+ more") as told:
        adapt.fit(module, tiny()[1], jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert len(str(told.value)) < 700
