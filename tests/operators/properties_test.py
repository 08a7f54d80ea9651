# SPDX-License-Identifier: Apache-2.0
"""What the table of the vocabulary says of every operator, measured.

Input-adaptive: the response to a sum is not the sum of the responses. Translation-equivariant:
rolling the input rolls the output, wherever the operator's radius stays away from the edge.
Reach: which inputs can move one output, from the Jacobian.
"""

import importlib
import pkgutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax import operators
from localglobal_jax.operators.adaptive import (
    AdaptiveConv,
    EquivariantAttention,
    EquivariantSequence,
)
from localglobal_jax.operators.attention import RelativeAttention, SelfAttention
from localglobal_jax.operators.convolution import DepthwiseConv, DynamicConv, SharedValueConv
from localglobal_jax.operators.focal import FocalAttention
from localglobal_jax.operators.focal_nearest import NearestFocalAttention
from localglobal_jax.operators.muse import Muse, MuseSequence
from localglobal_jax.operators.outlook import Outlook

FOCAL = FocalAttention(4, heads=2, window=2, expand=1, levels=3, focal_window=3)
NEAREST = NearestFocalAttention(4, heads=2, window=2, count=9)
GRID, SEQUENCE = (12, 12), (16,)
TABLE = {  # operator, space, input-adaptive, translation-equivariant, reach, radius
    "depthwise": (DepthwiseConv(3), GRID, False, True, "LOCAL", 1),
    "depthwise 1-D": (DepthwiseConv(5), SEQUENCE, False, True, "LOCAL", 2),
    "adaptive": (AdaptiveConv(4, heads=2, window=5), GRID, True, True, "LOCAL", 2),
    "adaptive 1-D": (AdaptiveConv(4, heads=2, window=7), SEQUENCE, True, True, "LOCAL", 3),
    "adaptive causal": (
        *(AdaptiveConv(4, heads=2, window=4, causal=True), SEQUENCE, True, True, "LOCAL", 3),
    ),
    "outlook": (Outlook(4, heads=2, stride=1), GRID, True, True, "LOCAL", 2),
    # with a stride the weights are shared by cells of the grid: only shifts by whole cells commute
    "outlook, stride 2": (Outlook(4, heads=2, stride=2), GRID, True, False, "LOCAL", 2),
    "relative": (RelativeAttention(4, heads=2), GRID, True, False, "GLOBAL", None),
    "relative, mlp": (RelativeAttention(4, heads=2, bias="mlp"), GRID, True, False, "GLOBAL", None),
    "plain": (RelativeAttention(4, heads=2, bias="none"), GRID, True, True, "GLOBAL", None),
    "equivariant": (EquivariantAttention(4, heads=2), GRID, True, True, "GLOBAL", None),
    "equivariant 1-D": (EquivariantAttention(4, heads=2), SEQUENCE, True, True, "GLOBAL", None),
    "muse": (Muse(4, heads=2, windows=(3, 5), hidden=8), GRID, True, False, "GLOBAL", None),
    "shared value": (SharedValueConv(2, (3, 7)), SEQUENCE, True, True, "LOCAL", 3),
    "muse over sequences": (MuseSequence(4, 2, 6), SEQUENCE, True, False, "GLOBAL", None),
    "muse-simple": (MuseSequence(4, 2, 6, windows=()), SEQUENCE, True, True, "GLOBAL", None),
    "plain 1-D": (SelfAttention(4, 2), SEQUENCE, True, True, "GLOBAL", None),
    "relative 1-D": (SelfAttention(4, 2, furthest=3), SEQUENCE, True, False, "GLOBAL", None),
    "gated dynamic": (DynamicConv(4, 2, window=5), SEQUENCE, True, True, "LOCAL", 2),
    "adaptive over sequences": (AdaptiveConv(4, 2, window=5), SEQUENCE, True, True, "LOCAL", 2),
    "equivariant over sequences": (
        *(EquivariantSequence(4, 2, furthest=3), SEQUENCE, True, True, "GLOBAL", None),
    ),
    "focal": (FOCAL, GRID, True, False, "BOTH", 3),
    "focal, nearest": (NEAREST, GRID, True, False, "BOTH", None),
}


@pytest.fixture(params=TABLE)
def case(request):
    module, space, *expected = TABLE[request.param]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, *space, 4)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    return jax.jit(lambda x: module.apply(variables, x)), x, module.reach, expected


def test_every_operator_is_in_the_table():
    found = set()
    for info in pkgutil.iter_modules(operators.__path__):
        module = importlib.import_module(f"{operators.__name__}.{info.name}")
        found |= {
            member
            for member in vars(module).values()
            if isinstance(member, type) and issubclass(member, nn.Module)
            if hasattr(member, "reach") and member.__module__ == module.__name__
        }
    assert found == {type(row[0]) for row in TABLE.values()}


def test_input_adaptive(case):
    run, x, _, (adaptive, *_) = case
    y = jnp.flip(x, 1) + 0.3
    zero = run(jnp.zeros_like(x))
    error = jnp.abs(run(x + y) - run(x) - run(y) + zero).max() / jnp.abs(run(x)).max()
    assert (error > 1e-2) if adaptive else (error < 1e-5)


def test_translation_equivariant(case):
    run, x, reach, (_, equivariant, *_) = case
    margin = reach.radius + 1 if reach.name == "LOCAL" else 0
    interior = (slice(None), *(slice(margin, n - margin) for n in x.shape[1:-1]))
    axes = tuple(range(1, x.ndim - 1))
    rolled, expected = run(jnp.roll(x, (1,) * len(axes), axes)), run(x)
    error = jnp.abs(rolled - jnp.roll(expected, (1,) * len(axes), axes))[interior].max()
    assert (error < 1e-5) if equivariant else (error > 1e-3)


def test_reach(case):
    run, x, reach, (_, _, name, radius) = case
    assert (reach.name, reach.radius) == (name, radius)
    space = x.shape[1:-1]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32)
    farthest = 0
    for position in [tuple(n // 2 for n in space), tuple(n // 2 - 1 for n in space)]:
        moved = jax.grad(lambda x, at=position: (run(x)[(0, *at)] * weights).sum())(x)[0]
        seen = np.asarray(jnp.abs(moved).max(-1) > 0)
        if radius is None and name == "GLOBAL":
            assert seen.all()
        away = np.abs(np.argwhere(seen) - np.array(position)).max()
        farthest = max(farthest, away)
    # an even window reaches one position farther to one side: both parities were looked at
    assert radius is None or farthest == radius
