# SPDX-License-Identifier: Apache-2.0
"""Fused and reference: the same outputs, gradients, running statistics and parameters.

Here in training, with large means, masks and dropout. Every operator, block and model family:
`differentiation_test.py`. Whole steps: `blocks/stack_test.py`, `parallel/strategies_test.py`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.blocks.convolution import MBConvBlock
from localglobal_jax.models.stems import ConvPatchStem, ConvStem
from localglobal_jax.operators.activations import ACTIVATIONS
from localglobal_jax.operators.attention import attend
from localglobal_jax.operators.kernels import attention as kernels
from localglobal_jax.operators.muse import MuseSequence
from localglobal_jax.parallel import context

MODULES = {
    "MBConv": MBConvBlock(features=24),
    "MBConv, stride 2": MBConvBlock(features=24, stride=2),
    "MBConv, stride in the expansion": MBConvBlock(features=24, stride=2, stride_at="expand"),
    "MBConv, early squeeze": MBConvBlock(features=24, squeeze_early=True, activation="silu"),
    "MBConv, no squeeze": MBConvBlock(features=16, squeeze_ratio=0.0, activation="relu"),
    "MBConv, LayerNorm": MBConvBlock(features=16, norm="layer"),
    "ConvStem": ConvStem((8, 12)),
    "ConvPatchStem": ConvPatchStem(8, 12, patch=4),
}


@pytest.fixture(params=["cpu", "tpu", "cuda", "rocm"])
def platform(request, monkeypatch):
    """Runs a platform's forms of the operators here, by value."""

    def chosen(*args, default, **forms):
        return forms.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    return request.param


def implemented(implementation, function, *args):
    """``function(*args)`` in one implementation, compiled."""

    def traced(*args):
        with context.implementation(implementation):
            return function(*args)

    return jax.jit(traced)(*args)


def same(function, *args, rtol=2e-4):
    """Compares both, leaf by leaf; the tolerance is relative to a leaf's largest number."""
    fused, reference = (implemented(name, function, *args) for name in ("fused", "reference"))
    assert jax.tree.structure(fused) == jax.tree.structure(reference)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(fused), jax.tree.leaves(reference), strict=True
    ):
        assert one.dtype == other.dtype
        a, b = (np.asarray(x, np.float64) for x in (one, other))
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, platform):
    module = MODULES[name]
    # a mean that is large beside the deviation is what a folded norm could lose
    x = 30 + 2 * jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: 0.3 * jnp.asarray(rng.normal(size=a.shape) + 5 * (a.ndim == 1), a.dtype), shapes
    )

    def step(params, x):
        def loss(params, x):
            own = {**variables, "params": params}
            y, new = module.apply(own, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, new, module.apply(own, x, train=False))

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    same(step, variables["params"], x)


def test_bfloat16_loses_no_more_than_the_reference(platform):
    """Against the same block in float32, with a mean that is large beside the deviation."""
    x = 30 + 2 * jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    variables = MBConvBlock(features=24).init(jax.random.key(1), x)

    def output(dtype):
        block = MBConvBlock(features=24, dtype=dtype)
        return lambda x: block.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    exact = implemented("reference", output("float32"), x)
    fused, reference = (
        jnp.abs(implemented(name, output("bfloat16"), x) - exact).max()
        for name in ("fused", "reference")
    )
    assert fused <= 1.25 * reference


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("bias", "mask"),
    [(None, None), ((2, 5, 7), None), ((1, 2, 1, 7), (3, 1, 1, 7)), ((3, 2, 5, 7), (3, 2, 5, 7))],
)
def test_attention(bias, mask, dropout, platform):
    def normal(i, shape):
        return None if shape is None else 2 * jax.random.normal(jax.random.key(i), shape)

    mask = None if mask is None else normal(4, mask) > -1
    kept = normal(5, (3, 2, 5, 7)) > -1 if dropout else None
    args = [normal(0, (3, 5, 2, 4)), normal(1, (3, 7, 2, 4)), normal(2, (3, 7, 2, 6))]

    def step(bias, *args):
        def loss(args, bias):
            y = attend(*args, bias=bias, mask=mask, kept=kept, dropout=dropout)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, argnums=(0,) if bias is None else (0, 1), has_aux=True)(args, bias)

    same(step, normal(3, bias), *args)


def test_muse_in_training(platform):
    """With every dropout, masks and cross-attention; the masks of dropout are the same."""
    module = MuseSequence(
        8, 2, 16, windows=(3, 9), causal=True, memory_features=8, dropout=0.3,
        attention_dropout=0.2, input_dropout=0.1, activation_dropout=0.1,
    )  # fmt: skip
    x, other = (jax.random.normal(jax.random.key(i), (2, 12, 8)) for i in range(2))
    mask = jnp.arange(12)[None] < jnp.array([[12], [7]])

    def call(module, x, other):
        memory = module.precompute_kv(other, mask)
        return module(x, mask=mask, memory=memory, train=True)

    keys = {"params": jax.random.key(2), "dropout": jax.random.key(3)}
    variables = module.init(keys, x, other, method=call)

    def step(variables, x, other):
        def loss(*args):
            return jnp.sum(jnp.sin(module.apply(*args, method=call, rngs=keys)))

        return jax.value_and_grad(loss, (0, 1, 2))(variables, x, other)

    same(step, variables, x, other)


def test_attention_survives_large_logits_and_rows_without_keys():
    query = jnp.full((1, 2, 1, 4), 300.0)
    mask = jnp.array([[[[True, True, False], [False, False, False]]]])
    key = value = jnp.arange(12.0).reshape(1, 3, 1, 4)
    same(jax.value_and_grad(lambda q: attend(q, key, value, mask=mask).sum()), query)


# shapes of query, key and bias; a bias without batch dimensions, or one per window
CUDNN = {
    "no bias": ((3, 8, 2, 8), (3, 10, 2, 8), None),
    "no bias, odd lengths": ((3, 9, 2, 8), (3, 11, 2, 8), None),
    "a bias": ((3, 8, 2, 8), (3, 10, 2, 8), (2, 8, 10)),
    "odd lengths": ((3, 9, 2, 8), (3, 11, 2, 8), (2, 9, 11)),
    "windows": ((2, 3, 4, 9, 2, 8), (2, 3, 4, 11, 2, 8), (3, 4, 2, 9, 11)),
    "one bias for all windows": ((2, 3, 4, 9, 2, 8), (2, 3, 4, 11, 2, 8), (1, 1, 2, 9, 11)),
    "windows, no bias": ((2, 3, 4, 9, 2, 8), (2, 3, 4, 11, 2, 8), None),
}


def of_shapes(query, key, bias):
    shapes = (query, key, key, bias)
    keys = jax.random.split(jax.random.key(0), 4)
    return [s and jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", CUDNN)
def test_what_is_given_to_cudnn_is_the_reference(name, monkeypatch):
    """By XLA's implementation of the same call: cuDNN itself runs on no CPU."""
    call = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **options):
        assert implementation == "cudnn"
        return call(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    query, key, value, bias = of_shapes(*CUDNN[name])

    def step(attention, *args):
        def loss(query, key, value, bias):
            y = attention(query, key, value, bias)
            return jnp.sum(jnp.sin(y)), y

        wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        return jax.grad(loss, argnums=wanted, has_aux=True)(*args, bias)

    ours = step(kernels.attend_cudnn, query, key, value)
    theirs = step(lambda q, k, v, b: attend(q, k, v, bias=b), query, key, value)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.fixture
def cudnn(monkeypatch):
    """The plugin of CUDA as jax sees it. Lowering needs no more of it."""
    lowered = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(lowered, "check_cudnn_version", lambda: 91000)
    kernels.has_cudnn.cache_clear()
    yield
    kernels.has_cudnn.cache_clear()


def calls_of_cudnn(query, key, value, bias, *, platform="cuda", dtype=jnp.bfloat16, **options):
    """Returns the calls in a gradient as lowered for a platform."""

    def loss(query, key, value, bias):
        with context.implementation("fused"):
            return attend(query, key, value, bias=bias, **options).astype(jnp.float32).sum()

    args = [x.astype(dtype) for x in (query, key, value)]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if bias is None else (0, 1, 2, 3)))
    text = step.trace(*args, bias).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"__cudnn\$\w+", text))


@pytest.mark.parametrize("name", CUDNN)
def test_attention_on_cuda_calls_cudnn_forward_and_backward(name, cudnn):
    kind = "fmhaSoftmax" if CUDNN[name][-1] is None else "fmhaScaleBiasSoftmax"
    found = calls_of_cudnn(*of_shapes(*CUDNN[name]))
    assert found == {f"__cudnn${kind}", f"__cudnn${kind}Backward"}


def test_the_bias_of_cudnn_is_split_by_no_position(cudnn):
    """A bias made of split parameters would be, which the partitioner of cuDNN's call refuses."""
    asked = []

    def whole(x, free):
        asked.append((x.shape, free))
        return x

    with context.tracing(whole=whole):
        calls_of_cudnn(*of_shapes(*CUDNN["windows"]))
    assert set(asked) == {((1, 3 * 4 * 2, 10, 12), 1)}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_attention_elsewhere_does_not(platform, cudnn):
    assert not calls_of_cudnn(*of_shapes(*CUDNN["a bias"]), platform=platform)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (CUDNN["a bias"], {"dtype": jnp.float32}),
        (CUDNN["a bias"], {"mask": jnp.ones((3, 1, 1, 10), bool)}),
        (CUDNN["a bias"], {"kept": jnp.ones((3, 2, 8, 10), bool), "dropout": 0.1}),
        (((3, 8, 2, 4), (3, 10, 2, 4), None), {}),  # heads that are too narrow
        (((3, 8, 1, 136), (3, 10, 1, 136), None), {}),  # or too wide
        (((3, 1, 2, 8), (3, 10, 2, 8), None), {}),  # decoding
        (((3, 8, 2, 8), (3, 10, 2, 8), (3, 2, 8, 10)), {}),  # a bias per example
        (((3, 8, 2, 8), (3, 10, 2, 8), (2, 1, 10)), {}),  # or not per query
    ],
)
def test_attention_that_cudnn_cannot_do_is_left_to_xla(shapes, options, cudnn):
    assert not calls_of_cudnn(*of_shapes(*shapes), **options)


def test_attention_without_the_plugin_of_cuda_is_left_to_xla(monkeypatch):
    kernels.has_cudnn.cache_clear()
    jax.clear_caches()  # of what the call below was traced to

    def none(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", none)
    assert not calls_of_cudnn(*of_shapes(*CUDNN["a bias"]))
    kernels.has_cudnn.cache_clear()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_in_bfloat16_loses_no_more_than_the_reference(dropout, platform):
    """Against float32, of the same rounded inputs."""
    shapes = [(3, 16, 2, 8), (3, 24, 2, 8), (3, 24, 2, 8)]
    keys = jax.random.split(jax.random.key(0), 6)
    args = [2 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    args = [x.astype(jnp.bfloat16) for x in args]
    bias = jax.random.normal(keys[3], (2, 16, 24))
    mask = jax.random.bernoulli(keys[4], 0.8, (3, 1, 1, 24))
    kept = jax.random.bernoulli(keys[5], 0.7, (3, 2, 16, 24)) if dropout else None

    def step(args, bias):
        def loss(args, bias):
            y = attend(*args, bias=bias, mask=mask, kept=kept, dropout=dropout)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))(args, bias)

    exact = implemented("reference", step, [x.astype(jnp.float32) for x in args], bias)
    fused, reference = (
        jax.tree.map(
            lambda a, b: float(jnp.linalg.norm(a.astype(jnp.float32) - b)),
            implemented(name, step, args, bias),
            exact,
        )
        for name in ("fused", "reference")
    )
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(reference), strict=True):
        assert ours <= 1.25 * theirs


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, platform):
    x = jnp.linspace(-9, 9, 400)
    same(jax.value_and_grad(lambda x: jnp.sum(ACTIVATIONS[name](x))), x, rtol=1e-6)
    same(ACTIVATIONS[name], x.astype(jnp.bfloat16), rtol=1e-2)  # jax rounds between its steps
