# SPDX-License-Identifier: Apache-2.0
"""Flax's own tools look into every model and block: tables with FLOPs, intermediates, remat."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import localglobal_jax as lg

WORDS = jnp.ones((1, 5), jnp.int32)
IMAGES = jnp.ones((1, 32, 32, 3))
SMALL = {"depths": (1, 1), "widths": (16, 16)}
MODELS = {
    "muse": {**SMALL, "layout": "MM", "heads": (2, 2), "hidden": (16, 16)},
    "coatnet": {**SMALL, "layout": "CT", "blocks": {"T": {"head_width": 8}}},
    "volo": {"layout": "O", "depths": (1,), "widths": (32,), "strides": (1,), "heads": (2,),
             "position": 0},
    "focal": {"depths": (1, 1, 1, 1), "widths": (32, 32, 32, 32), "heads": (1, 1, 1, 1)},
}  # fmt: skip


def of(name):
    module = lg.create_model(name, **MODELS[name])
    return module, (WORDS, WORDS) if name == "muse" else (IMAGES,)


@pytest.mark.parametrize("name", MODELS)
def test_a_table_of_a_model_has_its_flops(name):
    module, inputs = of(name)
    table = module.tabulate(
        jax.random.key(0), *inputs, compute_flops=True, compute_vjp_flops=name == "coatnet",
        console_kwargs={"width": 300},
    )  # fmt: skip
    assert "flops" in table


@pytest.mark.parametrize("letter", lg.blocks.SEQUENCE_BLOCKS)
def test_a_table_of_a_sequence_block_has_its_flops(letter):
    block = lg.blocks.SEQUENCE_BLOCKS[letter](16, 2, 8)
    assert "flops" in block.tabulate(jax.random.key(0), jnp.ones((1, 4, 16)), compute_flops=True)


@pytest.mark.parametrize("name", MODELS)
def test_all_intermediates_of_a_model_are_arrays(name):
    module, inputs = of(name)
    variables = jax.jit(module.init)(jax.random.key(0), *inputs)

    @jax.jit
    def apply(variables, *inputs):
        return module.apply(
            variables, *inputs, capture_intermediates=True, mutable=["intermediates"]
        )

    _, kept = jax.eval_shape(apply, variables, *inputs)
    assert len(jax.tree.leaves(kept)) > 5
    _, kept = jax.eval_shape(
        jax.jit(
            lambda v, *x: module.apply(
                v, *x, capture_intermediates=lambda *_: True, mutable=["intermediates"]
            )
        ),
        variables,
        *inputs,
    )
    assert len(jax.tree.leaves(kept)) > 5


@pytest.mark.parametrize("letter", lg.blocks.BLOCKS)
def test_a_block_can_be_rematerialised(letter):
    """As the page says: `train` goes around `nn.remat`, which would trace it."""

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            block = lg.blocks.BLOCKS[letter](32, name="block")
            return nn.remat(lambda block, x: block(x, train=train))(block, x)

    x = jnp.ones((1, 4, 4, 32))
    variables = jax.eval_shape(Mine().init, jax.random.key(0), x)
    plain = jax.eval_shape(lg.blocks.BLOCKS[letter](32).init, jax.random.key(0), x)
    assert jax.tree.structure(variables["params"]["block"]) == jax.tree.structure(plain["params"])
