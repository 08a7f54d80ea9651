# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy against float64 NumPy, and the identities that tie its forms together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.training import losses


def reference(logits, target):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -(target * log_p).sum(-1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(4,), (2, 3), (1, 2, 2)]),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([1.0, 80.0]),
)
def test_labels_and_distributions_agree_with_float64(seed, shape, smoothing, scale):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(*shape, 7)) * scale).astype(np.float32)
    labels = rng.integers(0, 7, shape)
    soft = np.eye(7, dtype=np.float32)[labels]
    expected = reference(logits, (1 - smoothing) * soft + smoothing / 7)
    for targets in (jnp.asarray(labels), jnp.asarray(soft)):
        loss = losses.cross_entropy(jnp.asarray(logits), targets, label_smoothing=smoothing)
        assert loss.shape == shape
        np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-5)


def test_mixed_targets_are_the_mixture_of_losses():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    one, two = jnp.array([0, 1, 2, 3, 0]), jnp.array([3, 1, 0, 0, 2])
    mixed = 0.3 * jax.nn.one_hot(one, 4) + 0.7 * jax.nn.one_hot(two, 4)
    parts = (0.3, one), (0.7, two)
    expected = sum(w * losses.cross_entropy(logits, y, label_smoothing=0.1) for w, y in parts)
    loss = losses.cross_entropy(logits, mixed, label_smoothing=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.ones((1, 30000), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    loss = losses.cross_entropy(logits, jnp.array([3]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(30000), rtol=1e-6)


def test_gradient_is_softmax_minus_target():
    logits, labels = jax.random.normal(jax.random.key(1), (3, 6)), jnp.array([0, 5, 2])
    grad = jax.grad(lambda x: losses.cross_entropy(x, labels, label_smoothing=0.2).sum())(logits)
    target = 0.8 * jax.nn.one_hot(labels, 6) + 0.2 / 6
    np.testing.assert_allclose(grad, jax.nn.softmax(logits) - target, atol=1e-6)


def test_a_switched_off_class_does_not_poison_the_loss():
    logits = jnp.array([[0.0, 1.0, -jnp.inf]])
    assert np.isfinite(losses.cross_entropy(logits, jnp.array([1]))).all()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_any_integer_type_is_a_label(dtype):
    logits = jax.random.normal(jax.random.key(2), (3, 6))
    labels = jnp.array([1, 2, 3])
    loss = losses.cross_entropy(logits, labels.astype(dtype))
    np.testing.assert_array_equal(loss, losses.cross_entropy(logits, labels))


def test_binary_cross_entropy_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (4, 3, 7))
    targets = rng.dirichlet(np.ones(7), (4, 3))
    p = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)
    arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
    np.testing.assert_allclose(losses.binary_cross_entropy(*arrays), expected, rtol=1e-5)
    far = jnp.array([[1e4, -1e4]], jnp.float32), jnp.array([[0.0, 1.0]], jnp.float32)
    np.testing.assert_allclose(losses.binary_cross_entropy(*far), [2e4])


def test_smoothing_spreads_over_all_classes():
    found = losses.smooth(jnp.array([[1.0, 0, 0, 0]]), 0.2)
    np.testing.assert_allclose(found, [[0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
