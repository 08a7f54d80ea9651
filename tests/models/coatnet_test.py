# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax import create_model, list_models

TINY = {
    "classes": 5,
    "layout": "CT",
    "depths": (1, 1),
    "widths": (8, 16),
    "stem": (8, 8),
    "blocks": {"T": {"head_width": 8}},
}


def tiny(**overrides):
    return create_model("coatnet", **{**TINY, **overrides})


def init(module, *size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    return x, jax.jit(lambda key: module.init(key, x, train=False))(jax.random.key(1))


def apply(module, variables, x):
    return jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)


def count(module, size=224):
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
    )
    return sum(x.size for x in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # timm's paper-style models, exactly; the paper gives 25, 42, 75, 168, 275 M
        ("coatnet_0", 25_036_820),
        ("coatnet_1", 42_225_776),
        ("coatnet_2", 74_684_744),
        ("coatnet_3", 166_966_264),
        ("coatnet_4", 275_425_288),
    ],
)
def test_parameters_of_the_papers_sizes(name, parameters):
    assert count(create_model(name)) == parameters


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (15, 31)])
@pytest.mark.parametrize("layout", ["CT", "TC", "CC", "TT", "ST"])
def test_any_layout_and_any_size_it_divides(layout, size):
    options = {"T": {"head_width": 8}, "S": {"head_width": 8}}
    module = tiny(layout=layout, blocks=options)
    x, variables = init(module, *size)
    logits, intermediates = apply(module, variables, x)
    assert logits.shape == (2, 5)
    h, w = ((n + 1) // 2 for n in size)
    assert {k: v.shape[1:] for k, v in intermediates.items()} == {
        "stem": (h, w, 8),
        "stage1": (h // 2, w // 2, 8),
        "stage2": (h // 4, w // 4, 16),
        "features": (16,),
    }


def test_a_mixed_stage_and_strides_of_one():
    module = tiny(layout=("CT", "T"), depths=(4, 1), strides=(1, 2), stem_stride=1)
    x, variables = init(module, 6, 4)
    assert set(variables["params"]["stage1"]) == {"block1", "block2", "block3", "block4"}
    assert "depthwise" in variables["params"]["stage1"]["block3"]
    assert "attention" in variables["params"]["stage1"]["block4"]
    assert apply(module, variables, x)[1]["stage2"].shape == (2, 3, 2, 16)


def test_size_that_does_not_divide_says_which_would():
    with pytest.raises(ValueError, match=r"20x16.*stage 2.*16x16"):
        init(tiny(), 20, 16)


def test_wrong_fields():
    with pytest.raises(ValueError, match=r'"coatnet_O".*"coatnet_'):
        create_model("coatnet_O")
    with pytest.raises(ValueError, match=r'"depth".*"depths"'):
        create_model("coatnet_0", depth=3)
    with pytest.raises(ValueError, match="depths"):
        init(tiny(depths=(1,)), 16, 16)
    with pytest.raises(ValueError, match=r"T.*head_with"):
        init(tiny(blocks={"T": {"head_with": 8}}), 16, 16)


def test_without_classifier_the_features_come_out():
    module = tiny(classes=0, head_hidden=7)
    x, variables = init(module, 16, 16)
    logits, intermediates = apply(module, variables, x)
    assert logits.shape == (2, 7)
    np.testing.assert_array_equal(logits, intermediates["features"])


def test_bfloat16_activations_float32_parameters_and_logits():
    x, variables = init(tiny(), 16, 16)
    logits, intermediates = apply(tiny(dtype="bfloat16"), variables, x)
    assert intermediates["stage2"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    reference, _ = apply(tiny(), variables, x)
    np.testing.assert_allclose(logits, reference, atol=0.1)


def test_an_example_does_not_depend_on_its_company():
    x, variables = init(tiny(), 16, 16)
    together, _ = apply(tiny(), variables, x)
    alone, _ = apply(tiny(), variables, x[1:])
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)


EVERYTHING = {  # every letter, every optional parameter
    "classes": 3,
    "layout": ("C", "N", "TS", "T"),
    "depths": (1, 1, 2, 1),
    "widths": (8, 16, 16, 32),
    "stem": (4, 8),
    "blocks": {
        "C": {"squeeze_early": True, "stride_at": "pool"},
        "N": {"layer_scale": 0.1},
        "S": {"head_width": 8, "layer_scale": 0.1, "norm": "batch"},
        "T": {"head_width": 8, "widen_at": "output", "bias": "mlp", "bias_hidden": 4},
    },
    "head_hidden": 8,
}


@pytest.mark.slow  # operators/differentiation_test.py compares forward with reverse mode
def test_a_gradient_step_equals_numerical_differentiation():
    """All parameters, in training mode (batch statistics), float64."""
    with jax.enable_x64(True):
        module = create_model("coatnet", **EVERYTHING, dtype="float64")
        x = jax.random.normal(jax.random.key(1), (3, 64, 32, 3), "float64")
        variables = jax.jit(lambda: module.init(jax.random.key(0), x, train=False))()
        variables = jax.tree.map(lambda leaf: leaf.astype("float64"), variables)
        parameters, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
        key = jax.random.key(2)
        # away from initialisation, where zeros would hide terms
        parameters = jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype), parameters
        )

        @jax.jit
        def loss(parameters):
            (logits, _), _ = module.apply(
                {"params": parameters, **rest},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(3)},
            )
            return -jax.nn.log_softmax(logits)[jnp.arange(3), jnp.arange(3)].mean()

        gradient = jax.jit(jax.grad(loss))(parameters)
        leaves, structure = jax.tree.flatten(parameters)
        rng = np.random.default_rng(0)
        for i, leaf in enumerate(leaves):  # every parameter array along a direction of its own
            direction = rng.normal(size=leaf.shape)
            step = 1e-5

            def moved(by, i=i, leaf=leaf, direction=direction):
                new = [*leaves[:i], leaf + by * direction, *leaves[i + 1 :]]
                return loss(jax.tree.unflatten(structure, new))

            numerical = (moved(step) - moved(-step)) / (2 * step)
            exact = np.vdot(jax.tree.leaves(gradient)[i], direction)
            np.testing.assert_allclose(exact, numerical, rtol=1e-5, atol=1e-8)


def test_every_model_is_listed():
    assert {"coatnet", "coatnet_0", "coatnet_5"} <= set(list_models())
