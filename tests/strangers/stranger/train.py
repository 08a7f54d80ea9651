"""Trains a model with an operator, a block and a backbone; then fine-tunes a checkpoint.

Usage: python -m stranger.train CHECKPOINT. Prints one JSON object: versions, losses, logits.
"""

import json
import sys
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import localglobal_jax as lg

STEPS = 30


class Mine(nn.Module):
    """A backbone, an operator and a block of the library, and a head of one's own."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        _, stages = self.backbone(images, train=train)
        x = lg.operators.Outlook(32, 4, name="outlook")(stages["stage2"])
        x = lg.blocks.BLOCKS["T"](features=32, name="block")(x, train=train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def fit(module: nn.Module, variables: Any, images: jax.Array, labels: jax.Array) -> list[float]:
    """Returns the losses of `STEPS` steps on one batch, with the BatchNorm statistics kept."""
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, rest: Any, moments: Any) -> Any:
        def loss(params: Any) -> Any:
            out, changed = module.apply(
                {"params": params, **rest}, images, train=True, mutable=list(rest),
                rngs={"dropout": jax.random.key(1)},
            )  # fmt: skip
            logits = out[0] if isinstance(out, tuple) else out
            given = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return given.mean(), changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), changed, moments, value

    moments, losses = optimizer.init(params), []
    for _ in range(STEPS):
        params, rest, moments, value = step(params, rest, moments)
        losses.append(float(value))
    return losses


def main(checkpoint: str) -> None:
    generator = np.random.default_rng(0)
    labels = jnp.asarray(generator.integers(0, 10, 16))
    images = jnp.asarray(generator.normal(size=(16, 32, 32, 3)), jnp.float32)
    mine = Mine(
        lg.create_model(
            "coatnet", layout="CA", depths=(1, 1), widths=(16, 32), stem=(8, 8), classes=0
        )
    )
    own = fit(mine, mine.init(jax.random.key(0), images), images, labels)

    module, variables = lg.load(checkpoint)
    images = jnp.asarray(generator.normal(size=(16, 8, 8, 1)), jnp.float32)
    logits, _ = module.apply(variables, images, train=False)
    restored = fit(module, variables, images, labels)
    print(
        json.dumps(
            {
                "versions": {"jax": jax.__version__, "flax": flax.__version__},
                "library": lg.__file__,
                "own": [own[0], own[-1]],
                "restored": [restored[0], restored[-1]],
                "logits": logits.tolist(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
