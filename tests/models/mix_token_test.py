# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.models import mix_token

GRID = (5, 8)


@pytest.fixture(scope="module")
def boxes():
    keys = jax.random.split(jax.random.key(0), 4000)
    return np.asarray(jax.jit(jax.vmap(lambda key: mix_token.sample_box(key, GRID)))(keys))


def test_boxes_lie_in_the_grid_and_have_even_sides_where_the_border_does_not_cut(boxes):
    top, left, bottom, right = boxes.T
    assert boxes.dtype == np.int32
    for first, last, size in ((top, bottom, GRID[0]), (left, right, GRID[1])):
        assert ((first >= 0) & (first <= last) & (last <= size)).all()
        free = (first > 0) & (last < size)
        assert ((last - first)[free] % 2 == 0).all()


def test_boxes_are_distributed_as_the_authors_draw_them(boxes):
    # lambda ~ U(0, 1), sides int(n sqrt(1 - lambda)), centre uniform, borders clipped: drawn again
    # with numpy, the means must agree (40 tokens; 4,000 draws give a standard error below 0.1).
    rng = np.random.default_rng(1)
    size = np.array(GRID)
    half = (size * np.sqrt(1 - rng.random((4000, 1)))).astype(int) // 2
    centre = rng.integers(0, size, (4000, 2))
    sides = np.minimum(centre + half, size) - np.maximum(centre - half, 0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert abs(area.mean() - sides.prod(1).mean()) < 0.5
    np.testing.assert_allclose((boxes[:, 2:] - boxes[:, :2]).mean(0), sides.mean(0), atol=0.15)


def test_swap_takes_the_box_from_the_mirrored_example_and_undoes_itself():
    x = np.random.default_rng(0).normal(size=(3, 11, 17, 2)).astype(np.float32)
    box = jnp.array((1, 2, 4, 5))
    y = np.asarray(mix_token.swap(jnp.asarray(x), box, scale=2))
    expected = x.copy()
    expected[:, 2:8, 4:10] = x[::-1, 2:8, 4:10]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(mix_token.swap(jnp.asarray(y), box, scale=2), x)


def test_kept_share_counts_tokens():
    share = mix_token.kept_share(jnp.array((1, 2, 4, 5)), GRID)
    np.testing.assert_allclose(share, 1 - 9 / 40, rtol=1e-6)
    assert mix_token.kept_share(jnp.array(mix_token.NO_BOX), GRID) == 1
