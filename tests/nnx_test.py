# SPDX-License-Identifier: Apache-2.0
"""Linen modules in NNX, through the bridge of flax."""

import jax
import numpy as np
from flax import nnx

import localglobal_jax as lg


def test_a_linen_module_works_in_nnx():
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    module = lg.create_model(
        "coatnet", classes=5, layout="CT", depths=(1, 1), widths=(8, 16), stem=(8, 8),
        blocks={"T": {"head_width": 8}},
    )  # fmt: skip
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x, train=False)
    logits, intermediates = model(x, train=False)
    assert intermediates["stage2"].shape == (2, 2, 2, 16)
    table = model.stage2["block1"]["attention"]["relative_bias"]["table"]
    assert table.shape == (3, 3, 2)  # the same tree under the same names
    assert np.all(np.isfinite(logits))
