# SPDX-License-Identifier: Apache-2.0
"""Reshapes lose nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.operators import grids

sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=10)
@given(sizes, sizes, st.integers(1, 4))
def test_windows_and_back(h, w, window):
    x = jnp.arange(2 * h * w * 3.0).reshape(2, h, w, 3)
    padded = grids.pad_to_multiple(x, window)
    assert all(
        n % window == 0 and n - m < window for n, m in zip(padded.shape[1:3], (h, w), strict=True)
    )
    tiles = grids.window_partition(padded, window)
    i, j = (h - 1) // window, (w - 1) // window
    expected = padded[:, i * window : (i + 1) * window, j * window : (j + 1) * window]
    np.testing.assert_array_equal(tiles[:, i, j], expected)
    merged = grids.window_merge(tiles)
    np.testing.assert_array_equal(merged, padded)
    np.testing.assert_array_equal(merged[:, :h, :w], x)
    assert float(jnp.abs(merged).sum()) == float(jnp.abs(x).sum())  # the rest is zeros


def test_partition_refuses_what_it_would_cut():
    with pytest.raises(ValueError, match=r"5x4.*2x2"):
        grids.window_partition(jnp.zeros((1, 5, 4, 1)), 2)


@settings(deadline=None, max_examples=8)
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 4))
def test_shifted_is_indexing(h, w, rows, columns):
    x = np.random.default_rng(0).normal(size=(1, h, w, 2)).astype(np.float32)
    padding = ((rows // 2, rows - 1 - rows // 2), (columns // 2, columns - 1 - columns // 2))
    copies = list(grids.shifted(jnp.asarray(x), (rows, columns), padding))
    assert len(copies) == rows * columns
    for n, copy in enumerate(copies):
        dy, dx = n // columns - rows // 2, n % columns - columns // 2
        for y in range(h):
            for z in range(w):
                inside = 0 <= y + dy < h and 0 <= z + dx < w
                expected = x[0, y + dy, z + dx] if inside else np.zeros(2)
                np.testing.assert_array_equal(copy[0, y, z], expected)
