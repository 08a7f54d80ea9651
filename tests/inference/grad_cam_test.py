# SPDX-License-Identifier: Apache-2.0
"""Grad-CAM: a map computed by hand, the gradient computed in a second way, and drawing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localglobal_jax as lg
from localglobal_jax.inference import grad_cam
from localglobal_jax.models import heads


class ByHand(nn.Module):
    """Two stages that do nothing; logits are the means of the channels' squares."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = first = Same(name="stage1")(x)
        x = Same(name="stage2")(2 * x)
        return jnp.square(x).mean((1, 2)), {"stage1": first, "stage2": x, "features": x}


class Same(nn.Module):
    """Nothing."""

    @nn.compact
    def __call__(self, x):
        return x


def test_the_map_that_equations_1_and_2_give():
    """Class c is channel c: its weight is the mean of 2x / (i j), another channel's is 0."""
    x = np.random.default_rng(0).normal(0, 1, (4, 3, 5, 2)).astype(np.float32)
    x[:, 1, 2, 0], x[2, 1, 2, 1] = 9, 20  # class 0, but class 1 in the third image
    logits, maps = grad_cam.grad_cam(ByHand(), {}, x)
    classes = [0, 0, 1, 0]
    assert logits.argmax(1).tolist() == classes
    for image, label, found in zip(2 * x, classes, maps, strict=True):
        channel = image[..., label]
        np.testing.assert_allclose(
            found, np.maximum(channel * (2 * channel / 15).mean(), 0), rtol=1e-5
        )
    _, first = grad_cam.grad_cam(ByHand(), {}, x, 1)
    np.testing.assert_allclose(first, maps, rtol=1e-5)  # twice the gradient, half the features
    with pytest.raises(ValueError, match="stage=3"):
        grad_cam.grad_cam(ByHand(), {}, x, 3)


MODELS = {
    "coatnet": {
        "layout": "T", "depths": (1,), "widths": (16,), "stem": (4, 8), "head_hidden": 8,
        "blocks": {"T": {"head_width": 8}},
    },
    "volo": {
        "layout": "O", "depths": (1,), "widths": (16,), "strides": (1,), "heads": (2,),
        "stem": 4, "position": 0, "class_blocks": 1,
    },
    "focal": {
        "layout": "F", "depths": (1,), "widths": (16,), "heads": (2,), "expand": (1,),
        "levels": (2,), "focal_windows": (3,), "window": 4, "image_size": (32, 48),
    },
}  # fmt: skip


def head(name, variables, x):
    """The logits from the last stage's output, by the head alone."""
    own = {"params": variables["params"]["head"]}
    if name == "volo":
        module = heads.ClassAttentionHead(3, 1, 2)
        logits, tokens, _ = module.apply(own, x)
        return logits + 0.5 * tokens.max((1, 2))
    given = {"hidden": 8} if name == "coatnet" else {"norm_first": True, "norm_eps": 1e-5}
    return heads.PoolingHead(3, **given).apply(own, x)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_head(name):
    x = jax.random.normal(jax.random.key(1), (3, 32, 48, 3))
    module = lg.create_model(name, classes=3, **MODELS[name])
    variables = jax.jit(module.init)(jax.random.key(0), x)
    logits, maps = jax.jit(grad_cam.grad_cam, static_argnums=0)(module, variables, x)
    expected, found = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
    features = found["stage1"]

    def score(features):
        return head(name, variables, features).max(-1).sum()

    weight = jax.grad(score)(features).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(
        maps, jnp.maximum((features * weight).sum(-1), 0), rtol=1e-3, atol=1e-6
    )
    assert maps.max() > 0


STAGES = {
    "coatnet": {"layout": "CT", "stem": (8, 8), "widths": (8, 32), "depths": (1, 2)},
    "volo": {
        "layout": "OS", "depths": (1, 2), "widths": (16, 16), "strides": (1, 2), "heads": (2, 2),
        "stem": 4, "position": 1, "class_blocks": 1,
    },
    "focal": {
        "layout": "FF", "depths": (1, 2), "widths": (16, 16), "heads": (2, 2), "expand": (1, 1),
        "levels": (2, 2), "focal_windows": (3, 1), "window": 4, "image_size": (32, 48),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_map(name):
    x = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    module = lg.create_model(name, classes=3, **STAGES[name])
    variables = jax.jit(module.init)(jax.random.key(0), x)
    expected, found = jax.jit(module.apply)(variables, x)
    draw = jax.jit(grad_cam.grad_cam, static_argnums=(0, 3))
    for stage in (1, 2):
        logits, maps = draw(module, variables, x, stage)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        assert maps.shape == found[f"stage{stage}"].shape[:-1]
        assert maps.min() >= 0 and maps.max() > 0
    np.testing.assert_array_equal(maps, draw(module, variables, x, None)[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_drawn(channels):
    """Grey where it did not look, colour where it did, dark where it could not."""
    picture = np.full((100, 200, channels), 120, np.uint8)
    looked = np.zeros((4, 4), np.float32)
    looked[0, 3] = 1e-12  # of any scale
    drawn = grad_cam.overlay(picture, looked, (0.0, 0.25, 1.0, 0.5)).astype(int)
    assert drawn.shape == (192, 384, 3)
    np.testing.assert_array_equal(drawn[:, [0, 95, 288, 383]], round(0.35 * 120))
    np.testing.assert_array_equal(drawn[100:, 96:180], 120)
    red, green, blue = drawn[20, 270]
    assert red > 180 and green > 160 and blue < green - 60  # yellow, not grey
    nothing = grad_cam.overlay(picture, np.zeros((4, 4), np.float32), (0, 0, 1, 1))
    np.testing.assert_array_equal(nothing, 120)


def test_a_map_may_reach_over_the_edge():
    """Of a crop above 1 the map covers a border, too."""
    looked = np.zeros((4, 4), np.float32)
    looked[1, 1] = 1.0  # in the upper left of the image, once its border is gone
    picture = np.full((400, 400, 3), 128, np.uint8)
    drawn = grad_cam.overlay(picture, looked, (-0.25, -0.25, 1.5, 1.5)).astype(int)
    assert drawn.shape == (400, 400, 3)
    colour = np.abs(drawn - drawn.mean(2, keepdims=True)).sum(2)
    y, x = np.unravel_index(colour.argmax(), colour.shape)
    assert y < 200 > x


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (7, 5), (2000, 1500)])
def test_pictures_of_any_shape(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    small = grad_cam.shrunk(picture)
    drawn = grad_cam.overlay(small, np.ones((2, 2), np.float32), (0.06, 0.06, 0.88, 0.88))
    assert 384 <= max(drawn.shape[:2]) <= 1024
    np.testing.assert_array_equal(
        drawn, grad_cam.overlay(picture, np.ones((2, 2), np.float32), (0.06, 0.06, 0.88, 0.88))
    )
