# SPDX-License-Identifier: Apache-2.0
"""Measures on CPU whether narrower weights speed up the products of decoding; prints a table.

    python experiments/benchmarks/decoding_products.py

Five rows (a beam) times matrices [384, 6632], as many as exceed every cache, in turns.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

ROWS, SHAPE, MATRICES, TURNS = 5, (384, 6632), 12, 15


def plain(x, weights):
    return [x @ matrix for matrix in weights]


def narrow(x, weights):
    return [jnp.matmul(x.astype(w.dtype), w, preferred_element_type=x.dtype) for w in weights]


def widened(x, weights):
    """Computes products in float32 with weights in int8 and a scale for each column."""
    return [x @ matrix.astype(x.dtype) * scale for matrix, scale in weights]


def integers(x, weights):
    """Computes products in int8, with x rounded too."""
    unit = jnp.abs(x).max(-1, keepdims=True) / 127
    rounded = jnp.rint(x / unit).astype(jnp.int8)
    return [jnp.matmul(rounded, w, preferred_element_type=jnp.int32) * unit * s for w, s in weights]


def in_int8(matrix):
    scale = np.abs(matrix).max(0) / 127
    return jnp.asarray(np.rint(matrix / scale), jnp.int8), jnp.asarray(scale)


def main():
    random = np.random.default_rng(0)
    matrices = [random.normal(size=SHAPE).astype(np.float32) for _ in range(MATRICES)]
    x = jnp.asarray(random.normal(size=(ROWS, SHAPE[0])), jnp.float32)
    weights = {kind: [jnp.asarray(m, kind) for m in matrices] for kind in ("float32", "bfloat16")}
    weights["int8"] = [in_int8(matrix) for matrix in matrices]
    sides = {
        "float32": (jax.jit(plain), "float32"),
        "bfloat16": (jax.jit(narrow), "bfloat16"),
        "int8, widened to float32": (jax.jit(widened), "int8"),
        "int8, x in int8 too": (jax.jit(integers), "int8"),
    }
    for function, kind in sides.values():
        jax.block_until_ready(function(x, weights[kind]))
    found = np.zeros((TURNS, len(sides), 2))
    for turn in found:
        for place, (function, kind) in zip(turn, sides.values(), strict=True):
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(x, weights[kind]))
            place[:] = time.perf_counter() - began[0], time.process_time() - began[1]
    faster = np.median(found[:, :1] / found, 0)
    print("| weights | times as fast | by CPU time | ms, best |\n| --- | --- | --- | --- |")
    for name, (wall, cpu), best in zip(sides, faster, found[..., 0].min(0), strict=True):
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {1e3 * best:.1f} |")


if __name__ == "__main__":
    main()
