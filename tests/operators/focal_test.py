# SPDX-License-Identifier: Apache-2.0
"""Focal attention against a key-by-key reading of its definition, and its parts by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.operators import focal
from localglobal_jax.operators.focal import FocalAttention
from localglobal_jax.operators.focal_nearest import NearestFocalAttention, nearest


def randomised(module, x, seed=0):
    """Parameters far from their initial values, so that no term can be silently zero."""
    tree = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    values = [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, values)


def run(module, params, x):
    return jax.jit(module.apply)({"params": params}, x)


def image(h, w, d, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, h, w, d)), jnp.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Definition:
    """One query and one key at a time, in float64, as the definition has it."""

    def __init__(self, module, params, x):
        self.m = module
        self.p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        grid, window = np.asarray(x[0], np.float64), module.window
        self.space = grid.shape[:2]
        grid = np.pad(grid, [(0, -n % window) for n in self.space] + [(0, 0)])
        self.size = grid.shape[:2]
        self.x = np.roll(grid, (-module.shift, -module.shift), (0, 1))
        self.q, self.k, self.v = self.project(self.x)

    def project(self, x):
        qkv = np.einsum("...d,dsnc->...snc", x, self.p["qkv"]["kernel"]) + self.p["qkv"]["bias"]
        return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]

    def fine_keys(self, a, b, qy, qx):
        """(key, value, bias) of the query's window and of its neighbours."""
        w, e, s = self.m.window, self.m.expand, self.m.shift
        (h, width), square = self.size, range(self.m.window)
        for ky in square:
            for kx in square:
                y, x = a * w + ky, b * w + kx
                bias = self.p["window_bias"][qy - ky + w - 1, qx - kx + w - 1]
                came_round = [
                    (a * w + qy >= h - s) != (y >= h - s),
                    (b * w + qx >= width - s) != (x >= width - s),
                ]
                yield self.k[y, x], self.v[y, x], bias - 100.0 * (s > 0 and any(came_round))
        count = 0
        for dy, dx in ((e, e), (e, -e), (-e, e), (-e, -e)):
            for ky in square:
                for kx in square:
                    if e and not (0 <= ky + dy < w and 0 <= kx + dx < w):
                        y, x = (a * w + ky + dy) % h, (b * w + kx + dx) % width
                        bias = self.p["neighbour_bias"][:, qy * w + qx, count]
                        yield self.k[y, x], self.v[y, x], bias
                        count += 1

    def coarse_keys(self, a, b, qy, qx, level):
        w, cells = self.m.window, 2 ** (level - 1)
        small, (h, width) = w // cells, self.size
        rows, columns = h // w * cells, width // w * cells
        top, left = (h - rows * small) // 2, (width - columns * small) // 2
        seen = self.m.focal_window + cells - 1
        pool, table = self.p[f"pool{level}"], self.p[f"pooled{level}_bias"]
        for i in range(seen):
            for j in range(seen):
                bias = table[qy - i + seen - 1, qx - j + seen - 1]
                row = a * cells - self.m.focal_window // 2 + i
                column = b * cells - self.m.focal_window // 2 + j
                if not (0 <= row < rows and 0 <= column < columns):
                    yield np.zeros_like(self.k[0, 0]), np.zeros_like(self.v[0, 0]), bias - 100.0
                    continue
                y, x = top + row * small, left + column * small
                patch = self.x[y : y + small, x : x + small]
                pooled = np.einsum("yxd,yx->d", patch, pool["kernel"]) + pool["bias"]
                _, key, value = self.project(pooled)
                yield key, value, bias

    def __call__(self):
        w, out = self.m.window, np.zeros((*self.size, *self.q.shape[2:]))
        for y in range(self.size[0]):
            for x in range(self.size[1]):
                at = (y // w, x // w, y % w, x % w)
                keys = list(self.fine_keys(*at))
                for level in range(1, self.m.levels):
                    keys += self.coarse_keys(*at, level)
                key, value, bias = (np.stack(part) for part in zip(*keys, strict=True))
                scale = self.m.scale or self.q.shape[-1] ** -0.5
                logits = np.einsum("nc,mnc->nm", self.q[y, x] * scale, key) + bias.T
                out[y, x] = np.einsum("nm,mnc->nc", softmax(logits), value)
        out = np.roll(out, (self.m.shift, self.m.shift), (0, 1))
        out = out[: self.space[0], : self.space[1]].reshape(*self.space, -1)
        return out @ self.p["output"]["kernel"] + self.p["output"]["bias"]


CASES = {
    "two levels": dict(window=4, expand=2, levels=2, focal_window=3),
    "groups that overlap": dict(window=5, expand=2, levels=2, focal_window=3),
    "groups that meet": dict(window=3, expand=3, levels=1),
    "three levels, trimmed": dict(window=3, expand=1, levels=3, focal_window=3),
    "four levels": dict(window=4, expand=1, levels=4, focal_window=1),
    "shift": dict(window=4, expand=1, levels=2, focal_window=3, shift=2),
    "shift, three levels": dict(window=5, expand=2, levels=3, focal_window=5, shift=2),
    "no neighbours, own scale": dict(window=4, expand=0, levels=2, focal_window=5, scale=0.9),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(12, 12), (7, 10)])
def test_equals_the_definition_key_by_key(name, size):
    module = FocalAttention(6, heads=2, **CASES[name])
    x = image(*size, 6)
    params = randomised(module, x)
    y = run(module, params, x)
    np.testing.assert_allclose(y[0], Definition(module, params, x)(), atol=3e-5)


def test_neighbours_of_the_paper_are_132_keys_at_120_places():
    x = jnp.arange(28 * 28.0).reshape(1, 28, 28, 1)
    keys = np.asarray(focal.neighbours(x, 7, 3))[0, 1, 1, :, 0]
    assert len(keys) == 132 and len(set(keys)) == 120
    rows, columns = keys // 28 - 7, keys % 28 - 7
    assert rows.min() == columns.min() == -3 and rows.max() == columns.max() == 9
    assert not ((rows >= 0) & (rows < 7) & (columns >= 0) & (columns < 7)).any()


def test_duplicates_count_twice():
    """Where two groups overlap the softmax has two terms, each with a bias of its own."""
    module = FocalAttention(2, heads=1, window=3, expand=1, levels=1)
    x = image(6, 6, 2)
    params = randomised(module, x)
    before = run(module, params, x)
    x_at = jnp.arange(36.0).reshape(1, 6, 6, 1)
    places = np.asarray(focal.neighbours(x_at, 3, 1))[0, 0, 0, :, 0]
    first, second = next(np.flatnonzero(places == p)[:2] for p in places if (places == p).sum() > 1)
    for index in (first, second):  # silencing one of the pair changes the output
        params["neighbour_bias"] = params["neighbour_bias"].at[..., index].set(-1e9)
        after = run(module, params, x)
        assert float(jnp.abs(after - before)[0, :3, :3].max()) > 1e-4
        before = after


@pytest.mark.parametrize("method", ["fc", "conv", "mean", "max"])
def test_pool_methods(method):
    module = FocalAttention(4, heads=2, window=2, expand=1, levels=2, pool=method)
    x = image(4, 6, 4)
    params = randomised(module, x)
    parameters = {"fc": [(2, 2), ()], "conv": [(2, 2, 4), (4,)], "mean": [], "max": []}[method]
    pool = params.get("pool1", {})
    assert [pool[k].shape for k in ("kernel", "bias") if k in pool] == parameters
    y = run(module, params, x)
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expand": 5}, "expand 5 "),
        ({"shift": 4}, "shift 4"),
        ({"levels": 5}, "5 levels .* 4"),
        ({"focal_window": 2}, "focal_window 2 "),
        ({"heads": 4}, "4 heads"),
    ],
)
def test_errors_say_what_is_allowed(fields, words):
    module = FocalAttention(6, **{"heads": 2, "window": 4, "expand": 2, "levels": 2, **fields})
    with pytest.raises(ValueError, match=words):
        module.init(jax.random.key(0), image(8, 8, 6))


def test_bfloat16_is_near_float32():
    x = image(8, 8, 8)
    fields = {"heads": 2, "window": 4, "expand": 2}
    params = randomised(FocalAttention(8, **fields), x)
    exact = run(FocalAttention(8, **fields), params, x)
    half = run(FocalAttention(8, **fields, dtype="bfloat16"), params, x)
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max())


# ---------------------------------------------------------------------------- nearest keys


def nearest_by_definition(module, params, x):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    grid, w = np.asarray(x[0], np.float64), module.window
    (h, width), tiles = grid.shape[:2], (grid.shape[0] // w, grid.shape[1] // w)

    def project(v):
        return np.einsum("...d,dsnc->...snc", v, p["qkv"]["kernel"]) + p["qkv"]["bias"]

    def bias(name, displacement):
        hidden = (
            displacement @ p[f"{name}_bias_hidden"]["kernel"] + p[f"{name}_bias_hidden"]["bias"]
        )
        output = p[f"{name}_bias_output"]
        return np.maximum(hidden, 0) @ output["kernel"] + output["bias"]

    out = np.zeros((h, width, *p["qkv"]["kernel"].shape[2:]))
    tile = grid.reshape(tiles[0], w, tiles[1], w, -1)
    pooled = np.einsum("iyjxd,yx->ijd", tile, p["pool1"]["kernel"]) + p["pool1"]["bias"]
    for y in range(h):
        for x_ in range(width):
            i, j = y // w, x_ // w
            fine = [(a, b) for a in range(h) for b in range(width)]
            fine.sort(key=lambda at: (at[0] - i * w - w // 2) ** 2 + (at[1] - j * w - w // 2) ** 2)
            coarse = [(a, b) for a in range(tiles[0]) for b in range(tiles[1])]
            coarse.sort(key=lambda at: (at[0] - i) ** 2 + (at[1] - j) ** 2)
            keys, biases = [], []
            for a, b in fine[: module.count]:
                keys.append(project(grid[a, b]))
                biases.append(bias("window", np.array([y - a, x_ - b], float)))
            for a, b in coarse[: module.count]:
                keys.append(project(pooled[a, b]))
                centre = np.array([a * w + w // 2, b * w + w // 2])
                biases.append(bias("pooled1", np.array([y, x_]) - centre))
            keys = np.stack(keys)
            query = project(grid[y, x_])[0] * out.shape[-1] ** -0.5
            logits = np.einsum("nc,mnc->nm", query, keys[:, 1]) + np.stack(biases).T
            out[y, x_] = np.einsum("nm,mnc->nc", softmax(logits), keys[:, 2])
    return out.reshape(h, width, -1) @ p["output"]["kernel"] + p["output"]["bias"]


@pytest.mark.parametrize(("count", "size"), [(10, (6, 9)), (5, (9, 9)), (200, (6, 6))])
def test_nearest_equals_the_definition(count, size):
    module = NearestFocalAttention(4, heads=2, window=3, count=count)
    x = image(*size, 4)
    params = randomised(module, x)
    y = run(module, params, x)
    np.testing.assert_allclose(y[0], nearest_by_definition(module, params, x), atol=3e-5)


def test_nearest_takes_any_grid_and_never_a_padded_key():
    module = NearestFocalAttention(4, heads=2, window=3, count=20, levels=1)
    x = image(5, 7, 4)
    y = run(module, randomised(module, x), x)
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())
    index, _ = nearest((2, 3), (5, 7), 3, 20)
    assert index.max() < 35 and all(len(set(row)) == 20 for row in index)


def test_nearest_refuses_a_third_level():
    module = NearestFocalAttention(4, heads=2, window=4, levels=3)
    with pytest.raises(ValueError, match="levels 3"):
        module.init(jax.random.key(0), image(8, 8, 4))


def test_windows_are_pooled_by_position_unless_told_otherwise():
    assert focal.WindowPool() == focal.WindowPool("fc")
