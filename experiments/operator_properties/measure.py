# SPDX-License-Identifier: Apache-2.0
"""Measures properties of every operator -> results.csv and erf.csv. Continues where it was stopped.

    python -m experiments.operator_properties.measure

Operators as they are initialised, width 64, four heads. A row of results.csv is an operator, a
space and a measure; a row of erf.csv is the receptive field of the centre.
"""

import csv
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.blocks import BLOCKS
from localglobal_jax.models import flops
from localglobal_jax.operators.adaptive import (
    AdaptiveConv,
    EquivariantAttention,
    EquivariantSequence,
)
from localglobal_jax.operators.attention import RelativeAttention, SelfAttention
from localglobal_jax.operators.convolution import DepthwiseConv, DynamicConv
from localglobal_jax.operators.focal import FocalAttention
from localglobal_jax.operators.focal_nearest import NearestFocalAttention
from localglobal_jax.operators.muse import Muse, MuseSequence
from localglobal_jax.operators.outlook import Outlook
from localglobal_jax.parallel import context

HERE = pathlib.Path(__file__).parent
D, N = 64, 4  # width, heads
GRID = {
    "depthwise convolution": DepthwiseConv(3),
    "MBConv (block)": BLOCKS["C"](D),
    "adaptive convolution": AdaptiveConv(D, N, window=7),
    "outlook attention": Outlook(D, N),
    "attention": RelativeAttention(D, N, bias="none"),
    "relative attention": RelativeAttention(D, N),
    "equivariant attention": EquivariantAttention(D, N),
    "MUSE": Muse(D, N),
    "focal attention": FocalAttention(D, N, window=4, expand=2),
    "focal, nearest keys": NearestFocalAttention(D, N, window=4, count=24),
}
SEQUENCE = {
    "depthwise convolution": DepthwiseConv(7),
    "dynamic convolution": DynamicConv(D, N, window=7),
    "adaptive convolution": AdaptiveConv(D, N, window=7),
    "attention": SelfAttention(D, N),
    "relative attention": SelfAttention(D, N, furthest=64),
    "equivariant attention": EquivariantSequence(D, N, furthest=64),
    "MUSE": MuseSequence(D, N, ffn="off"),
}
SPACES = {
    "grid": (GRID, [(8, 8), (16, 16), (32, 32)]),
    "sequence": (SEQUENCE, [(64,), (256,), (1024,)]),
}
SEEN = {"grid": (16, 16), "sequence": (64,)}  # where all but cost is measured
DRAWS = 8  # inputs, and directions of the output, that a field is averaged over
ROUNDS = 30  # of timing


def inputs(space, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, *space, D)), jnp.float32)


def ready(module, space):
    """Returns the operator as a compiled function of x."""
    variables = jax.jit(module.init)(jax.random.key(0), inputs(space, 0))

    def run(x):
        with context.implementation("fused"):  # as in training
            return module.apply(variables, x)

    return jax.jit(run)


def pulled(run, x, direction, before=0):
    """Returns the gradient of `direction` of the centre's output by every input: [*space, d]."""
    middle = tuple(n // 2 - before for n in x.shape[1:-1])
    return jax.grad(lambda x: (run(x)[(0, *middle)] * direction).sum())(x)[0]


def properties(module, space):
    """Returns {measure: value}, and the effective receptive field."""
    run, x = ready(module, space), inputs(space, 1)
    pull = jax.jit(lambda x, direction: pulled(run, x, direction))
    directions = jax.random.normal(jax.random.key(1), (DRAWS, D))
    fields = [np.asarray(pull(inputs(space, 10 + i), u)) for i, u in enumerate(directions)]
    other = [np.asarray(pull(inputs(space, 50 + i), u)) for i, u in enumerate(directions)]
    weights = np.mean([np.linalg.norm(f, axis=-1) for f in fields], 0)
    change = np.mean([np.linalg.norm(a - b) for a, b in zip(fields, other, strict=True)])
    away = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in space), indexing="ij"), -1)
    # Of an operator with a stride, two neighbours see differently far
    neighbour = jnp.abs(pulled(run, x, directions[0], before=1)).max(-1) > 0
    farthest = max(np.abs(away[weights > 0]).max(), np.abs(away[neighbour] + 1).max())
    reach = getattr(module, "reach", None)
    found = {
        "declared": ""
        if reach is None
        else " ".join([reach.name, str(reach.radius or "")]).strip(),
        "farthest": int(farthest),
        "spread": float(np.sqrt((weights * (away**2).sum(-1)).sum() / weights.sum())),
        "dynamic": float(change / np.mean([np.linalg.norm(f) for f in fields])),
        "circular": shifted(run, x),
        "interior": shifted(run, x, inside=True),
    }
    return found, weights / weights.max()


def shifted(run, x, inside=False):
    """Returns the relative error of the output's shift when the input shifts by one.

    `inside`: the outer quarters are zeros, and only the positions between them are compared.
    """
    axes = tuple(range(1, x.ndim - 1))
    where = (
        slice(None),
        *(slice(n // 4, n - n // 4) if inside else slice(None) for n in x.shape[1:-1]),
    )
    x = jnp.zeros_like(x).at[where].set(x[where])
    straight = run(x)
    back = jnp.roll(run(jnp.roll(x, (1,) * len(axes), axes)), (-1,) * len(axes), axes)
    return float(jnp.linalg.norm((back - straight)[where]) / jnp.linalg.norm(straight[where]))


def ratio(run, reference, x):
    """Returns the time of `run` over that of `reference`: the median over rounds, in turns."""
    found = []
    for _ in range(ROUNDS + 3):
        times = []
        for function in (run, reference):
            began = time.perf_counter()
            jax.block_until_ready(function(x))
            times.append(time.perf_counter() - began)
        found.append(times[0] / times[1])
    return statistics.median(found[3:])  # the first ones compile


def costs(module, reference, space):
    x = inputs(space, 0)
    length = x[0, ..., 0].size
    with context.implementation("reference"):  # the equations, nothing made twice
        key = jax.random.key(0)
        count = flops.multiply_adds(lambda x: module.init_with_output(key, x)[0], x)
    yield f"multiply-adds {length}", count / length
    run = ready(module, space)
    # A multiply-add is two operations. What is made of shifts counts here, but above as nothing.
    operations = run.lower(x).compile().cost_analysis()["flops"]
    yield f"compiled {length}", operations / 2 / length
    yield f"time {length}", ratio(run, ready(reference, space), x)


def measure(kind, name):
    """Returns all rows of an operator."""
    operators, sizes = SPACES[kind]
    found, field = properties(operators[name], SEEN[kind])
    for space in sizes:
        found |= costs(operators[name], operators["depthwise convolution"], space)
    return found, field


def append(file, head, rows):
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([head, *rows] if new else rows)


def main():
    results, erf = HERE / "results.csv", HERE / "erf.csv"
    done = set()
    if erf.exists():  # written last
        with open(erf, newline="") as file:
            done = {(row["space"], row["operator"]) for row in csv.DictReader(file)}
    for kind, (operators, _) in SPACES.items():
        for name in operators:
            if (kind, name) in done:
                continue
            found, field = measure(kind, name)
            shown = {k: v if isinstance(v, str) else f"{v:.6g}" for k, v in found.items()}
            rows = [(name, kind, k, v) for k, v in shown.items()]
            append(results, ("operator", "space", "measure", "value"), rows)
            values = " ".join(f"{v:.4g}" for v in field.ravel())
            append(erf, ("operator", "space", "values"), [(name, kind, values)])
            print(kind, name, shown, flush=True)


if __name__ == "__main__":
    main()
