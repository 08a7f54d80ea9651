# SPDX-License-Identifier: Apache-2.0
"""Attention maps are those of the model."""

import jax
import numpy as np

from localglobal_jax.models import registry
from localglobal_jax.training.reporting.html import predictions


def test_where_attention_looks():
    """It is a distribution over the grid, and the one of the weights that `attend` uses."""
    options = {"layout": "CT", "depths": (1, 1), "widths": (8, 32), "stem": (4, 8), "classes": 3}
    module = registry.create_model("coatnet", strides=(1, 2), **options)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), pixels)
    maps = predictions.attention_map(module, variables, pixels)
    assert maps.shape == (2, 8, 12) and (maps > 0).all()
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    attention = variables["params"]["stage2"]["block1"]["attention"]
    kernel = np.zeros_like(attention["qkv"]["kernel"])
    table = np.full_like(attention["relative_bias"]["table"], -50)
    table[7, 11] = 0  # no displacement: every place looks at itself, and is looked at by itself
    attention |= {"qkv": {**attention["qkv"], "kernel": kernel}, "relative_bias": {"table": table}}
    np.testing.assert_allclose(
        predictions.attention_map(module, variables, pixels), 1 / 96, rtol=1e-3
    )
    local = registry.create_model("coatnet", strides=(1, 2), **{**options, "layout": "CC"})
    variables = jax.jit(local.init)(jax.random.key(0), pixels)
    assert predictions.attention_map(local, variables, pixels) is None
