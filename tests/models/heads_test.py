# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.models.heads import ClassAttention, ClassAttentionHead

TOKENS = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))


def build(**fields):
    head = ClassAttentionHead(**{"classes": 5, "heads": 2, **fields})
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(head.init, jax.random.key(1), TOKENS)
    draw = lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return head, jax.tree.map(draw, shapes)


def test_only_the_class_token_is_changed_by_the_blocks():
    """The logits of the tokens come from the norm alone: class blocks do not reach them."""
    head, variables = build()
    _, aux, _ = jax.jit(head.apply)(variables, TOKENS)
    p = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(TOKENS)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * p["norm"]["scale"] + p["norm"]["bias"]
    expected = normed @ p["aux_classifier"]["kernel"] + p["aux_classifier"]["bias"]
    np.testing.assert_allclose(aux, expected, atol=1e-4)


def test_the_class_token_sees_all_tokens_and_not_their_order():
    head, variables = build()
    logits = jax.jit(lambda x: head.apply(variables, x)[0])
    grad = jax.jit(jax.grad(lambda x: logits(x)[0, 0]))(TOKENS)
    assert (np.abs(grad[0]).sum(-1) > 0).all()
    assert not grad[1].any()
    turned = TOKENS[:, ::-1].swapaxes(1, 2)
    np.testing.assert_allclose(logits(turned), logits(TOKENS), atol=1e-5)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(("classes", "aux"), [(5, True), (5, False), (0, True)])
def test_every_combination_of_outputs(blocks, classes, aux):
    head, variables = build(blocks=blocks, classes=classes, aux=aux)
    logits, tokens, features = jax.eval_shape(head.apply, variables, TOKENS)
    assert logits.shape == (2, classes or 8)
    assert features.shape == (2, 8)
    assert (tokens is not None and tokens.shape == (2, 3, 4, 5)) == bool(classes and aux)
    assert ("class_token" in variables["params"]) == bool(blocks)


def test_logits_are_float32_whatever_the_blocks_compute_in():
    head, variables = build(dtype="bfloat16")
    logits, aux, _ = jax.eval_shape(head.apply, variables, TOKENS.astype(jnp.bfloat16))
    assert logits.dtype == aux.dtype == jnp.float32


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"8.*3 heads"):
        ClassAttention(3).init(jax.random.key(0), jnp.zeros((1, 4, 8)))
