# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.data.images.device_ops import mix

B, H, W = 6, 12, 20


def batch(c=3, dtype=jnp.float32):
    """Image i is plain i + 1, label i is one-hot: the mixture can be read off the pixels."""
    images = jnp.broadcast_to(jnp.arange(1.0, B + 1)[:, None, None, None], (B, H, W, c))
    return images.astype(dtype), jnp.eye(B), jnp.ones(B)


def shares(images):
    """How much of each pixel is the partner's, image values being i + 1 and b - i."""
    own, other = jnp.arange(1.0, B + 1), jnp.arange(1.0, B + 1)[::-1]
    return (images[..., 0] - own[:, None, None]) / (other - own)[:, None, None]


run = jax.jit(mix, static_argnames=("mixup", "cutmix"))


@pytest.mark.parametrize(
    ("kwargs", "c"), [(dict(mixup=0.8, cutmix=0.0), 3), (dict(mixup=0.0, cutmix=1.0), 1)]
)
def test_labels_take_the_same_share_as_pixels(kwargs, c):
    images, labels, mask = batch(c)
    seen = []
    for seed in range(12):
        mixed, soft = run(jax.random.key(seed), images, labels, mask, **kwargs)
        part = shares(mixed)
        share = part.mean(axis=(1, 2))
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(jnp.diag(soft), 1 - share, atol=1e-5)
        np.testing.assert_allclose(jnp.diag(soft[:, ::-1]), share, atol=1e-5)
        assert share.min() >= 0 and share.max() <= 1
        seen.append(float(share[0]))
        if kwargs["mixup"]:
            assert part.max() - part.min() < 1e-5
        else:
            assert set(np.unique(np.round(part, 5))) <= {0, 1}
            rows, columns = np.nonzero(np.round(part[0]))
            area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 0
            assert len(rows) == area  # one full rectangle
    assert max(seen) - min(seen) > 0.3


def test_both_on_takes_one_at_random():
    images, labels, mask = batch()
    plain = []
    for seed in range(24):
        mixed, _ = run(jax.random.key(seed), images, labels, mask, mixup=1.0, cutmix=1.0)
        part = shares(mixed)[0]
        plain.append(bool(part.max() - part.min() < 1e-5 and 0 < part.max() < 1))
    assert 4 < sum(plain) < 20


@pytest.mark.parametrize("kwargs", [dict(mixup=1.0, cutmix=0.0), dict(mixup=0.0, cutmix=1.0)])
def test_masked_examples_leak_into_nobody(kwargs):
    images, labels, mask = batch()
    mask = mask.at[0].set(0)
    images = images.at[0].set(jnp.nan)
    mixed, soft = run(jax.random.key(1), images, labels, mask, **kwargs)
    np.testing.assert_array_equal(mixed[B - 1], images[B - 1])
    np.testing.assert_array_equal(soft[B - 1], labels[B - 1])
    assert not jnp.isnan(mixed[1:]).any()


def test_off_is_off_and_types_stay():
    images, labels, mask = batch(dtype=jnp.bfloat16)
    same = mix(jax.random.key(0), images, labels, mask, mixup=0.0, cutmix=0.0)
    assert same[0] is images and same[1] is labels
    mixed, soft = run(jax.random.key(0), images, labels, mask, mixup=0.2, cutmix=0.2)
    assert mixed.dtype == jnp.bfloat16 and soft.dtype == jnp.float32


def test_wants_floating_images():
    with pytest.raises(ValueError, match="uint8"):
        mix(
            jax.random.key(0),
            jnp.zeros((2, 4, 4, 1), jnp.uint8),
            jnp.eye(2),
            jnp.ones(2),
            mixup=1.0,
            cutmix=0.0,
        )
