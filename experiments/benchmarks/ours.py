# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): our models.

python ours.py infer|train|decode NAME BATCH [plain] [FIELD=VALUE ...] [image=PIXELS]

"plain": the equations, differentiated by JAX, `parallel.implementation=reference`.
"""

import os
import sys
import time

# what `localglobal` sets for itself, see `cli.main.console`
if "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import ast

import jax
import optax

import localglobal_jax as lg
from localglobal_jax.parallel import context

CLASSES, TOKENS = 1000, 6000
REPEATS = 3  # a turn


def example(name, batch, pixels):
    """Inputs and labels: square images, or sentences of 32 tokens."""
    key = jax.random.key(0)
    if name.startswith(("muse", "transformer")):
        source, target = jax.random.randint(key, (2, batch, 32), 4, TOKENS)
        return (source, target), target
    image = jax.random.normal(key, (batch, pixels, pixels, 3))
    return (image,), jax.random.randint(key, (batch,), 0, CLASSES)


def init(module, inputs):
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(
        lambda: module.init(jax.random.key(1), *inputs, train=False), compiler_options=quick
    )()


def infer(module, inputs, labels):
    variables = init(module, inputs)
    step = jax.jit(lambda v, *x: module.apply(v, *x, train=False)[0])
    return lambda: step(variables, *inputs)


def train(module, inputs, labels):
    """A training step: cross-entropy, gradient, AdamW."""
    variables = dict(init(module, inputs))
    state = [variables.pop("params"), variables]
    optimizer = optax.adamw(1e-3)
    state.append(optimizer.init(state[0]))

    def update(params, rest, moments, *inputs):
        def loss(params):
            (logits, _), changed = module.apply(
                {"params": params, **rest},
                *inputs,
                train=True,
                mutable=list(rest),
                rngs={"dropout": jax.random.key(2)},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), rest, moments

    step = jax.jit(update, donate_argnums=(0, 1, 2))

    def go():
        state[:] = step(*state, *inputs)
        return state

    return go


def decode(module, inputs, labels):
    """Beam 5, thirty tokens each."""
    variables = init(module, inputs)
    source = inputs[0][:, :30]
    search = lg.decoding.beam_search
    return lambda: search(module, variables, source, beam=5, max_length=29, min_length=29)


def make(work, name, batch, *options):
    """The work as a function, warm."""
    implementation = "reference" if "plain" in options else "fused"
    fields = {k: ast.literal_eval(v) for k, _, v in (o.partition("=") for o in options) if v}
    pixels = fields.pop("image", 224)
    module = lg.create_model(name, **fields)
    works = {"infer": infer, "train": train, "decode": decode}
    go = works[work](module, *example(name, int(batch), pixels))
    with context.implementation(implementation):
        for _ in range(2):
            jax.block_until_ready(go())
    return go


def main(*command):
    go = make(*command)
    print(f"ready jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    for _ in sys.stdin:
        jax.block_until_ready(go())  # see pairs.py
        began = time.perf_counter()
        for _ in range(REPEATS):
            jax.block_until_ready(go())
        print("seconds", (time.perf_counter() - began) / REPEATS, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
