# SPDX-License-Identifier: Apache-2.0
"""Every operator over sequences: what it sees, one step at a time, padding, fused or not."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.models import flops
from localglobal_jax.operators.adaptive import AdaptiveConv, EquivariantSequence
from localglobal_jax.operators.attention import CrossAttention, SelfAttention
from localglobal_jax.operators.convolution import DynamicConv
from localglobal_jax.operators.muse import MuseSequence

D, HEADS, LENGTH = 8, 2, 7
MUSE = partial(MuseSequence, D, HEADS, 6)
OPERATORS = {
    "muse": MUSE,
    "simple": partial(MUSE, windows=()),
    "one window": partial(MUSE, windows=(7,)),
    "gate off": partial(MUSE, windows=(3, 5), gate=False),
    "depthwise": partial(MUSE, windows=(3, 5), kind="depthwise"),
    "standard": partial(MUSE, windows=(3,), kind="standard"),
    "separate": partial(MUSE, windows=(3, 5), projection="separate"),
    "separate, standard": partial(MUSE, windows=(5,), projection="separate", kind="standard"),
    "no ffn": partial(MUSE, ffn="off"),
    "shared ffn": partial(MUSE, windows=(3,), ffn="shared"),
    "separate, shared ffn": partial(MUSE, windows=(3,), ffn="shared", projection="separate"),
    "attention": partial(SelfAttention, D, HEADS),
    "relative": partial(SelfAttention, D, HEADS, furthest=3),
    "dynamic": partial(DynamicConv, D, HEADS, 5),
    "adaptive": partial(AdaptiveConv, D, HEADS, window=3),
    "equivariant": partial(EquivariantSequence, D, HEADS, furthest=2),
    "depthwise alone": partial(DynamicConv, D, HEADS, 3, kind="depthwise"),
}


def made(name, **options):
    """A module with random parameters far from where they begin, and an input."""
    module = OPERATORS[name](**options)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, D))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [v + 0.3 * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(tree, leaves), x


def sees(module, variables, x):
    """[l, m]: whether the output at l depends on the input at m."""

    @jax.jit
    def jacobian(x):
        return jax.jacrev(lambda x: module.apply(variables, x[None])[0])(x)

    return np.abs(jacobian(x[0])).max((1, 3)) > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_causal_operators_never_see_the_future_and_local_ones_no_further_than_they_say(name):
    for causal in (True, False):
        module, variables, x = made(name, causal=causal)
        seen, radius = sees(module, variables, x), module.reach.radius
        for i, j in itertools.product(range(LENGTH), repeat=2):
            far = radius is not None and abs(i - j) > radius
            assert seen[i, j] == (not far and not (causal and j > i)), (i, j)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_looks_ahead_has_no_steps(name):
    module = OPERATORS[name](causal=False)
    x = jnp.ones((1, 1, D))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    cache = jax.eval_shape(lambda: OPERATORS[name](causal=True).init_cache(1, 2))
    with pytest.raises(ValueError, match="causal=True"):
        module.init_cache(1, 2)
    with pytest.raises(ValueError, match="causal=True"):
        jax.eval_shape(lambda v, c: module.apply(v, x, c, 0, method="step"), variables, cache)


@pytest.mark.parametrize("name", OPERATORS)
def test_steps_are_the_parallel_pass(name):
    module, variables, x = made(name, causal=True)
    # padding before, inside and after: it is not special, but it must be the same both ways
    mask = jnp.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 0]], bool)

    @jax.jit
    def both(variables, x, mask):
        def step(cache, at):
            here = jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1)
            valid = mask & (jnp.arange(LENGTH)[None] <= at)
            options = {"method": "step", "valid": valid}
            y, cache = module.apply(variables, here, cache, at, **options)
            return cache, y[:, 0]

        cache = module.apply(variables, 2, LENGTH, method="init_cache")
        _, steps = jax.lax.scan(step, cache, jnp.arange(LENGTH))
        return module.apply(variables, x, mask=mask), steps.swapaxes(0, 1)

    np.testing.assert_allclose(*both(variables, x, mask), atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_stands_at_padding_never_matters(name, causal):
    module, variables, x = made(name, causal=causal)
    mask = jnp.array([[1] * 7, [0, 0, 1, 1, 1, 1, 0]], bool)
    apply = jax.jit(lambda x: module.apply(variables, x, mask=mask))
    noise = 9 * jax.random.normal(jax.random.key(5), x.shape)
    other = jnp.where(mask[..., None], x, noise)
    np.testing.assert_array_equal(apply(x)[mask], apply(other)[mask])


def test_it_does_matter_in_the_published_way():
    module, variables, x = made("muse", zero_padding=False)
    mask = jnp.array([[1] * 7, [0, 0, 1, 1, 1, 1, 0]], bool)
    apply = jax.jit(lambda x: module.apply(variables, x, mask=mask))
    other = jnp.where(mask[..., None], x, 9.0)
    assert np.abs(apply(x)[1, 2:6] - apply(other)[1, 2:6]).max() > 0.01


FUSED = list(itertools.product(["shared", "separate"], ["own", "shared", "off"], [None, 6]))


def run_muse(module, encoded, x):
    """Reads `encoded` if it can."""
    mask = jnp.ones(encoded.shape[:2], bool)
    memory = None if module.memory_features is None else module.precompute_kv(encoded, mask)
    return module(x, memory=memory)


@pytest.mark.parametrize(("projection", "ffn", "memory"), FUSED)
def test_fused_changes_no_number_and_makes_few_products_of_many(projection, ffn, memory):
    encoded = jax.random.normal(jax.random.key(3), (2, 5, 6))
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, D))
    fields = {"windows": (3, 5), "gate": False, "projection": projection, "ffn": ffn}
    module = MUSE(**fields, causal=True, memory_features=memory)
    variables = jax.jit(nn.init(run_muse, module))(jax.random.key(1), encoded, x)
    variables = jax.tree.map(lambda v: v + 0.1, variables)
    results, products, sizes = [], [], []
    for fused in (False, True):
        apply = nn.apply(run_muse, module.clone(fused=fused))

        def loss(*args, apply=apply):
            return (apply(*args) ** 2).sum()

        gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        results.append(gradient(variables, encoded, x))
        lowered = jax.jit(apply).lower(variables, encoded, x)
        products.append(lowered.as_text().count("stablehlo.dot_general"))
        sizes.append(flops.multiply_adds(apply, variables, encoded, x))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), *results)
    matrices_in = 1 + (projection == "separate") + (ffn == "own") + (memory is not None)
    matrices_out = 1 + (ffn != "off") + (memory is not None)
    assert products[0] - products[1] == matrices_in - 1 + matrices_out - 1
    assert sizes[0] == sizes[1]


def merged(a, b):
    """Parameters of two methods: a module makes those that the method touches."""
    a, b = a.get("params", a), b.get("params", b)
    both = {**a, **b}
    for name in a.keys() & b.keys():
        both[name] = merged(a[name], b[name]) if isinstance(a[name], dict) else a[name]
    return both


def test_dropout_where_the_published_code_has_it():
    """One at a time: each moves the result in training, none at evaluation or when it is zero."""
    off = {"kernel_dropout": 0.0}
    fields = ("dropout", "attention_dropout", "kernel_dropout", "input_dropout")
    module, variables, x = made("muse", **off)
    still = module.apply(variables, x)
    train = partial(module.apply, variables, x, train=True, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_allclose(train(), still, atol=1e-6)
    for field in (*fields, "activation_dropout"):
        for fused in (False, True):
            noisy = module.clone(**{field: 0.5}, fused=fused)
            rngs = {"dropout": jax.random.key(3)}
            assert (noisy.apply(variables, x, train=True, rngs=rngs) != still).any(), field
            np.testing.assert_allclose(noisy.apply(variables, x), still, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "relative", "dynamic", "adaptive", "equivariant"])
def test_dropout_of_weights(name):
    module, variables, x = made(name, dropout=0.5)
    still = module.apply(variables, x)
    quiet = module.clone(dropout=0.0).apply(variables, x, train=True)
    np.testing.assert_allclose(quiet, still, atol=1e-6)
    noisy = module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(3)})
    assert (noisy != still).any()


def test_fused_draws_the_same_dropout():
    module, variables, x = made("muse", dropout=0.5, input_dropout=0.3)
    rngs = {"dropout": jax.random.key(3)}
    plain = module.apply(variables, x, train=True, rngs=rngs)
    fused = module.clone(fused=True).apply(variables, x, train=True, rngs=rngs)
    np.testing.assert_allclose(plain, fused, atol=1e-6)


def test_parameters_begin_as_in_the_published_code():
    d = 64
    module = MuseSequence(d, 4, 3 * d)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 2, d)))["params"]

    def uniform(kernel, bound):
        assert bound * 0.98 < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)

    for kernel in (params["qkv"], params["hidden"], params["convolution"]["kernel15"]):
        uniform(kernel["kernel"], d**-0.5)
    uniform(params["output"]["kernel"], (3 / (2 * d)) ** 0.5)
    uniform(params["pointwise"]["kernel"], (3 * d) ** -0.5)
    np.testing.assert_array_equal(params["convolution"]["gate"], [0.5, 0.5])
    for name in ("qkv", "hidden", "output", "pointwise"):
        assert not params[name]["bias"].any()


def test_several_rows_may_share_a_memory():
    module = CrossAttention(D, HEADS, 6)
    encoded, x = jax.random.normal(jax.random.key(3), (2, 5, 6)), jnp.ones((6, 1, D))
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    variables = merged(
        module.init(jax.random.key(0), encoded, mask, method="precompute_kv"),
        module.init(
            jax.random.key(1),
            x[:2],
            {"key": jnp.ones((2, 2, 5, 4)), "value": jnp.ones((2, 2, 5, 4)), "mask": mask},
        ),
    )
    x = jax.random.normal(jax.random.key(2), x.shape)

    def run(encoded, mask):
        memory = module.apply({"params": variables}, encoded, mask, method="precompute_kv")
        return module.apply({"params": variables}, x, memory)

    repeated = run(jnp.repeat(encoded, 3, 0), jnp.repeat(mask, 3, 0))
    np.testing.assert_allclose(run(encoded, mask), repeated, atol=1e-6)


def test_mistakes():
    x = jnp.ones((1, 3, D))
    with pytest.raises(ValueError, match=r"windows \(4,\)"):
        MUSE(windows=(4,)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="hidden=0"):
        MuseSequence(D, HEADS).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"width 8 .* 3 heads"):
        MuseSequence(D, 3, 4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="memory_features"):
        MUSE(memory_features=3).init(jax.random.key(0), x)
