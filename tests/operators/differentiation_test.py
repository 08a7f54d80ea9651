# SPDX-License-Identifier: Apache-2.0
"""All of JAX's transformations on every operator, block and model, and the fused implementation.

`CASES` are checked against the registries, so that a new letter needs a case here.
"""

import dataclasses
import operator
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from localglobal_jax import blocks, operators
from localglobal_jax.models import VOLO, CoAtNet, EncoderDecoder, FocalTransformer
from localglobal_jax.parallel import context, placement

GRID, SEQUENCE, IMAGE = (1, 4, 4, 8), (1, 6, 8), (1, 32, 32, 3)
OPERATORS = {
    "DepthwiseConv": (operators.DepthwiseConv(3), GRID),
    "DepthwiseConv, stride 2": (operators.DepthwiseConv(3, stride=2), SEQUENCE),
    "AdaptiveConv": (operators.AdaptiveConv(8, 2, window=3), GRID),
    "AdaptiveConv over sequences": (operators.AdaptiveConv(8, 2, window=3), SEQUENCE),
    "Outlook": (operators.Outlook(8, 2), GRID),
    "RelativeAttention": (operators.RelativeAttention(8, 2), GRID),
    "RelativeAttention, mlp": (operators.RelativeAttention(8, 2, bias="mlp"), GRID),
    "EquivariantAttention": (operators.EquivariantAttention(8, 2), GRID),
    "Muse": (operators.Muse(8, 2, hidden=8), GRID),
    "FocalAttention": (operators.FocalAttention(8, 2, window=2, expand=1), GRID),
    "NearestFocalAttention": (operators.NearestFocalAttention(8, 2, window=2, count=5), GRID),
    "MuseSequence": (operators.MuseSequence(8, 2, 8, windows=(3, 9)), SEQUENCE),
    "SelfAttention": (operators.SelfAttention(8, 2, causal=True, furthest=3), SEQUENCE),
    "EquivariantSequence": (operators.EquivariantSequence(8, 2, furthest=3), SEQUENCE),
    "DynamicConv": (operators.DynamicConv(8, 2, window=9), SEQUENCE),
    "SharedValueConv": (operators.SharedValueConv(2, (3,), "standard"), SEQUENCE),
}


def block(letter):
    kind = blocks.BLOCKS[letter]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(features=8, **({"head_width": 4} if "head_width" in fields else {}))


BLOCKS = {f"block {letter}": (block(letter), GRID) for letter in blocks.BLOCKS}
LAYERS = {
    f"layer {letter}": (kind(features=8, heads=2, hidden=8), SEQUENCE)
    for letter, kind in blocks.SEQUENCE_BLOCKS.items()
}
PAIRS = {"widths": (8, 8), "heads": (2, 2), "depths": (1, 1)}
MODELS = {
    "CoAtNet": (CoAtNet(classes=3, layout="CT", stem=(8, 8), widths=(8, 32), depths=(1, 1)), IMAGE),
    "VOLO": (
        VOLO(classes=3, layout="OS", strides=(1, 2), stem=8, position=2, class_blocks=1, **PAIRS),
        IMAGE,
    ),
    "FocalTransformer": (
        FocalTransformer(
            classes=3, layout="FF", window=4, expand=(2, 1), levels=(2, 2), focal_windows=(3, 1),
            image_size=32, **PAIRS,
        ),
        IMAGE,
    ),
    "EncoderDecoder": (
        EncoderDecoder(source_vocab=9, target_vocab=9, layout="MM", hidden=(8, 8), **PAIRS),
        None,
    ),
}  # fmt: skip
CASES = OPERATORS | BLOCKS | LAYERS | MODELS
# Tests whose programs are many or large: every operator in the suite, what is made of them if slow.
OPERATORS_FIRST = [
    name if name in OPERATORS else pytest.param(name, marks=pytest.mark.slow) for name in CASES
]


def prepared(name, module=None):
    """``(apply, argument)``: a function of one pytree of float32 arrays, and its argument."""
    module, shape = module or CASES[name][0], CASES[name][1]
    rng = np.random.default_rng(0)
    if shape is None:  # tokens have no derivative: the embedding tables do
        inputs = (jnp.array([[4, 5, 6, 2]]), jnp.array([[2, 7, 8]]))
    else:
        inputs = (jnp.asarray(rng.normal(size=shape), jnp.float32),)
    options = {"train": False} if name in MODELS or name in BLOCKS else {}
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )
    if "batch_stats" in variables:  # variances are positive
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])

    def apply(argument):
        params, inputs = argument
        y = module.apply({**variables, "params": params}, *inputs, **options)
        return y[0] if isinstance(y, tuple) else y

    if shape is None:
        return lambda params: apply((params, inputs)), variables["params"]
    return apply, (variables["params"], inputs)


def directions(argument, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), argument)


def close(a, b, tolerance=2e-3):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def test_every_operator_and_letter_has_a_case():
    found = {type(module) for module, _ in CASES.values()}
    declared = {
        kind
        for kind in vars(operators).values()
        if isinstance(kind, type) and isinstance(getattr(kind, "reach", None), property)
    }
    assert declared <= found
    assert {*blocks.BLOCKS.values(), *blocks.SEQUENCE_BLOCKS.values()} <= found


@pytest.mark.parametrize("name", CASES)
def test_reference_has_every_transformation(name):
    apply, argument = prepared(name)
    direction = directions(argument, 1)

    def along(t):  # the module's output along a line, [*out]
        return jnp.sin(apply(jax.tree.map(lambda x, d: x + t * d, argument, direction)))

    def total(t):
        return along(t).sum()

    @jax.jit
    def transformed(t):
        tangent = jax.jvp(along, (t,), (jnp.ones(()),))[1]
        y, linear = jax.linearize(along, t)
        weights = jnp.cos(3 * y)
        return {
            "jvp": tangent,
            "jacfwd": jax.jacfwd(along)(t),
            "linearize": linear(jnp.ones(())),
            "hessian": jax.hessian(total)(t),
            "weighted": jnp.vdot(weights, tangent),
            "vmap": jax.vmap(along)(jnp.stack([t, t + 0.01])),
            # by reverse mode and one by one, to compare with
            "reverse": jax.vjp(along, t)[1](weights)[0],
            "reverse of reverse": jax.grad(jax.grad(total))(t),
            "loop": jnp.stack([y, along(t + 0.01)]),
        }

    found = transformed(jnp.zeros(()))
    close(found["weighted"], found["reverse"])
    close(found["jacfwd"], found["jvp"], 1e-4)
    close(found["linearize"], found["jvp"], 1e-4)
    close(found["hessian"], found["reverse of reverse"], 1e-2)
    close(found["vmap"], found["loop"], 1e-4)


@pytest.mark.parametrize("name", OPERATORS_FIRST)
def test_reference_works_under_checkpoint_scan_and_shard_map(name):
    apply, argument = prepared(name)
    _, shape = CASES[name]
    axis = placement.make_mesh({"data": 2})

    def total(argument):
        return jnp.sin(apply(argument)).sum()

    @jax.jit
    def transformed(argument):
        two = jax.tree.map(lambda x: jnp.stack([x, 1.01 * x]), argument)
        if shape is None:
            two = jax.tree.map(lambda x: jnp.stack([x, x]), argument)
        spec = jax.sharding.PartitionSpec("data")
        one_each = jax.shard_map(
            lambda part: apply(jax.tree.map(lambda x: x[0], part))[None],
            mesh=axis, in_specs=spec, out_specs=spec,
        )  # fmt: skip
        return {
            "gradient": jax.grad(total)(argument),
            "checkpoint": jax.grad(jax.checkpoint(total))(argument),
            "loop": jnp.stack([apply(jax.tree.map(operator.itemgetter(i), two)) for i in (0, 1)]),
            "scan": jax.lax.scan(lambda carry, x: (carry, apply(x)), 0, two)[1],
            "vmap over parameters": jax.vmap(apply)(two),
            "shard_map": one_each(two),
        }

    found = transformed(argument)
    for a, b in zip(*(jax.tree.leaves(found[k]) for k in ("checkpoint", "gradient")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))
    for transformation in ("scan", "vmap over parameters", "shard_map"):
        close(found[transformation], found["loop"], 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", OPERATORS_FIRST)
def test_reference_computes_in_other_dtypes(name, dtype):
    module, _ = CASES[name]
    whole, argument = prepared(name)
    with jax.enable_x64(dtype == "float64"):
        apply, _ = prepared(name, module.clone(dtype=dtype))
        cast = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), argument)
        found = jax.jit(apply)(cast)
        assert found.dtype == dtype or (name in MODELS and found.dtype == "float32")
    close(found, whole(argument), 0.1 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_an_input_without_a_batch_is_one_line(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    module, shape = CASES[name]
    options = {"train": False} if name in MODELS or name in BLOCKS else {}
    whole = (jnp.ones(shape),) if shape else (jnp.ones((1, 4), int), jnp.ones((1, 3), int))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *whole, **options))
    with pytest.raises(ValueError, match=r"shape \(.*\[b, .*x\[None\]") as error:
        jax.eval_shape(lambda v: module.apply(v, *(x[0] for x in whole), **options), variables)
    assert "\n" not in str(error.value)


WORDS = [
    (name, field.name)
    for name, (module, _) in CASES.items()
    for field in dataclasses.fields(module)
    if typing.get_origin(field.type) is typing.Literal
]


@pytest.mark.parametrize(("name", "field"), WORDS)
def test_a_word_that_a_field_does_not_have_is_refused(name, field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    module, shape = CASES[name]
    inputs = (jnp.ones(shape),) if shape else (jnp.ones((1, 4), int), jnp.ones((1, 3), int))
    with pytest.raises(ValueError, match=rf"({field}=|{field.split('_')[-1]} )'wrong'.*allowed"):
        wrong = module.clone(**{field: "wrong"})
        jax.eval_shape(wrong.init, jax.random.key(0), *inputs)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "fused") for name in CASES), *((name, "reference") for name in OPERATORS)],
)
def test_a_batch_of_none(name, implementation):
    module, shape = CASES[name]
    options = {"train": False} if name in MODELS or name in BLOCKS else {}
    none = (jnp.ones((0, *shape[1:])),) if shape else (jnp.ones((0, 4), int), jnp.ones((0, 3), int))

    def outputs(variables):
        y = module.apply(variables, *none, **options)
        return y[0] if isinstance(y, tuple) else y

    def step():
        variables = module.init(jax.random.key(0), *none, **options)
        return jax.value_and_grad(lambda v: outputs(v).sum())(variables), outputs(variables)

    with context.implementation(implementation):
        # of blocks and models the shapes: their operators are computed here
        (_, gradient), y = jax.jit(step)() if name in OPERATORS else jax.eval_shape(step)
    assert y.shape[0] == 0 and y.size == 0
    if name in OPERATORS:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", CASES)
def test_fused_computes_the_reference(name):
    apply, argument = prepared(name)

    def step(implementation):
        def loss(argument):
            y = apply(argument)
            return jnp.sin(y).sum(), y

        def traced(argument):
            with context.implementation(implementation):
                return jax.grad(loss, has_aux=True)(argument)

        return jax.jit(traced)(argument)

    fused, reference = step("fused"), step("reference")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(fused), jax.tree.leaves(reference), strict=True
    ):
        assert a.dtype == b.dtype
        scale = max(np.abs(b).max(), 1e-3 * largest)
        assert np.abs(a - b).max() <= 1e-3 * scale, jax.tree_util.keystr(path)


def test_fused_attention_has_no_forward_derivative():
    q = jnp.ones((1, 3, 2, 4))
    with context.implementation("fused"), pytest.raises(TypeError):
        jax.jvp(lambda q: operators.attend(q, q, q), (q,), (q,))
    jax.jvp(lambda q: operators.attend(q, q, q), (q,), (q,))  # outside, the default


def test_implementation_is_nested_and_named():
    assert context.chosen_implementation() == "reference"
    with context.implementation("fused"):
        with context.implementation("reference"):
            assert not context.is_fused()
        assert context.is_fused()
    assert context.chosen_implementation("fused") == "fused"
    with pytest.raises(ValueError, match="tuned"), context.implementation("tuned"):
        pass


@pytest.mark.parametrize("module", ["operators", "operators.attention"])
def test_operators_import_neither_schema_nor_sharding(module):
    heavy = (
        *("pydantic", "ml_collections", "localglobal_jax.config.schema"),
        *("localglobal_jax.parallel.sharding", "localglobal_jax.parallel.placement"),
    )
    code = f"import sys, localglobal_jax.{module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert found.stdout.strip() == "[]"
