# SPDX-License-Identifier: Apache-2.0
"""Fused softmax attention: stores one array of weights per direction, or none on GPU.

The equation is `operators.attention.attend`. Legend: b batch, l m lengths, n heads, c v widths.
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from localglobal_jax.parallel import context


def _by_heads(*arrays: Array) -> list[Array]:
    """Swaps positions and heads: [..., l, n, c] -> [..., n, l, c], and back."""
    return [jnp.swapaxes(x, -3, -2) for x in arrays]


def _logits(query: Array, key: Array, bias: Array | None, mask: Array | None) -> Array:
    logits = jnp.einsum(
        "...nlc,...nmc->...nlm",
        query * query.shape[-1] ** -0.5,
        key,
        preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
    )
    if bias is not None:
        ones = (1,) * (logits.ndim - bias.ndim)
        logits = logits + bias.astype(logits.dtype).reshape(*ones, *bias.shape)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return logits


def attend(keep: float, *inputs: Any) -> Array:
    """Computes `operators.attention.attend`; on NVIDIA's GPUs by cuDNN, where that can do it.

    `keep` is 1 - dropout; `inputs` are query, key, value, bias, mask and kept of
    `operators.attention.attend`.
    """
    query, key, value, bias, mask, kept = inputs
    if mask is not None or kept is not None or not cudnn_can(query, key, value, bias):
        return attend_stored(keep, *inputs)

    def stored(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        return attend_stored(keep, query, key, value, bias, None, None)

    # A function of its own: jax keeps what it traced, with the shardings of its context.
    cudnn = partial(attend_cudnn)
    return context.per_platform(query, key, value, bias, cuda=cudnn, default=stored)


def cudnn_can(query: Array, key: Array, value: Array, bias: Array | None) -> bool:
    """Returns whether cuDNN has this attention and its gradient, without dropout and mask.

    It has 16-bit dtypes and heads of equal width up to 128. A few queries, as in decoding, are left
    to XLA.
    """
    width, lengths = query.shape[-1], (query.shape[-3], key.shape[-3])
    return (
        query.ndim >= 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and value.shape[-1] == width
        and width % 8 == 0
        and width <= 128
        and min(lengths) >= FEW
        and (bias is None or (bias.ndim < query.ndim and bias.shape[-2:] == lengths))
        and has_cudnn()
    )


FEW = 8  # positions
_HALF = jax.ShapeDtypeStruct((1, FEW, 1, 8), jnp.bfloat16)


@cache
def has_cudnn() -> bool:
    """Returns whether jax finds cuDNN: whether its CUDA plugin is installed."""
    try:
        jax.eval_shape(attend_cudnn, _HALF, _HALF, _HALF, None)
    except RuntimeError:
        return False
    return True


def attend_cudnn(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
    """Computes softmax attention by cuDNN, which stores one number per query and head.

    The softmax is in float32; the bias is rounded to the dtype of the values. Axes that query and
    bias share in front of the heads (windows) become heads, so that the bias has no batch. jax
    takes gradients of even lengths only: odd ones get one more position, which has no weight.
    """
    (*front, length, heads, _), m = query.shape, key.shape[-3]
    at = len(front) if bias is None else query.ndim - bias.ndim
    windows = front[at:]

    def rows(x: Array) -> Array:  # [*b, *windows, l, n, c] -> [b, l, windows x n, c]
        x = jnp.moveaxis(x, -3, at)
        return x.reshape(-1, x.shape[at], math.prod(windows) * heads, x.shape[-1])

    query, key, value = map(rows, (query, key, value))
    query = _pad(query, 1, length % 2)
    key, value = (_pad(x, 1, m % 2) for x in (key, value))
    seen = None
    if bias is not None:
        bias = jnp.broadcast_to(bias.astype(query.dtype), (*windows, heads, length, m))
        bias = bias.reshape(1, -1, length, m)
        bias = _pad(_pad(bias, 2, length % 2), 3, m % 2, NOTHING)
        # Parameters that are split by position would split it, which cuDNN's call does not allow.
        bias = context.replicate(bias, free=1)
    elif m % 2:
        seen = jnp.full(key.shape[:1], m, jnp.int32)
    y = jax.nn.dot_product_attention(
        query, key, value, bias, key_value_seq_lengths=seen, implementation="cudnn"
    )
    y = y[:, :length].reshape(*front[:at], length, *windows, heads, y.shape[-1])
    return jnp.moveaxis(y, at, -3)


NOTHING = -3e4  # added to a logit, whose exp is zero then; float16 has it


def _pad(x: Array, axis: int, after: int, value: float = 0.0) -> Array:
    if not after:
        return x
    config = [(0, 0)] * x.ndim
    config[axis] = (0, after)
    return jnp.pad(x, config, constant_values=value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_stored(keep: float, *inputs: Any) -> Array:
    """Computes `attend`, storing one array [b, n, l, m] in each direction.

    The stored arrays have the dtype of the values. Forward, that is
    the numerator of the softmax, which the backward pass reads again. Backward, it is the gradient
    of the logits: the term that the softmax subtracts, ``sum_m g_lm w_lm``, is ``g_l . y_l``
    (arXiv 2205.14135, B.4). Products have the heads in front, ``[b, n, l, c]``: XLA on CPU took
    2.5 times as long for the others. With CoAtNet's 196 positions it takes 0.52 of the cycles and
    0.36 of the bytes of the equation (v5e).
    """
    return _attend_forward(keep, *inputs)[0]


def _attend_forward(keep: float, *inputs: Any) -> tuple[Array, Any]:
    numerators = partial(_numerator_forward, keep)
    forms = {"cuda": partial(_weights_forward, keep)} if _has_tiny(inputs) else {}
    stored, total, y = context.per_platform(
        *inputs, tpu=partial(numerators, twice=True), default=numerators, **forms
    )
    return y, (*inputs, stored, total, y)


TINY = 2.0**-100  # times a weight: nothing in a sum with others


def _has_tiny(arrays: Any) -> bool:
    """Returns whether the values, the third array, have a dtype with the exponents of float32."""
    return bool(jnp.finfo(arrays[2].dtype).smallest_normal <= TINY)


def _numerator_forward(keep: float, *inputs: Any, twice: bool = False) -> tuple[Array, ...]:
    query, key, value, bias, mask, kept = inputs
    query, key, value = _by_heads(query, key, value)
    exponentials, total = numerator(query, key, bias, mask, twice=twice)
    exponentials = exponentials.astype(value.dtype)
    left = _where(kept, exponentials)
    y = jnp.einsum("...nlm,...nmv->...nlv", left, value, preferred_element_type=total.dtype)
    (y,) = _by_heads((y / (total * keep)).astype(value.dtype))
    return exponentials, total, y


def _weights_forward(keep: float, *inputs: Any) -> tuple[Array, ...]:
    """Stores the weights of the values, and -`TINY` times those that dropout takes away.

    For GPU. A softmax is one kernel there, which reads the logits once. One array is the operand of
    the products with the values and tells the backward pass all weights and the mask of dropout.
    """
    query, key, value, bias, mask, kept = inputs
    query, key, value = _by_heads(query, key, value)
    weights = jax.nn.softmax(_logits(query, key, bias, mask), -1)
    total = jnp.zeros_like(weights[..., :1])  # not used
    if kept is not None:
        weights = jnp.where(kept, weights / keep, -TINY * weights)
    # Behind a barrier: XLA would store the logits in float32 for the backward pass.
    weights = lax.optimization_barrier(weights.astype(value.dtype))
    (y,) = _by_heads(jnp.einsum("...nlm,...nmv->...nlv", weights, value))
    return weights, total, y


def numerator(
    query: Array, key: Array, bias: Array | None, mask: Array | None, *, twice: bool = False
) -> tuple[Array, Array]:
    """Returns ``exp(logits - their maximum)`` [..., n, l, m] and its sum [..., n, l, 1].

    Query and key have the heads in front. `twice`: computes the logits again behind a barrier;
    otherwise XLA stores them in float32 and reads them three times. Twice is cheaper on TPU, which
    fuses ``exp`` with the product. It is not on CPU (1.25 times the time), nor on GPU, where a
    product is a library call.
    """
    logits = _logits(query, key, bias, mask)
    highest = logits.max(-1, keepdims=True, initial=-jnp.inf)
    if twice:
        *again, highest = jax.lax.optimization_barrier((query, key, bias, mask, highest))
        logits = _logits(*again)
    exponentials = jnp.exp(logits - highest)
    return exponentials, exponentials.sum(-1, keepdims=True)


def _attend_backward(keep: float, saved: Any, g: Array) -> tuple[Array | None, ...]:
    forms = {"cuda": partial(_weights_backward, keep)} if _has_tiny(saved) else {}
    gradients = context.per_platform(*saved, g, default=partial(_numerator_backward, keep), **forms)
    return (*gradients, None, None)


def _numerator_backward(keep: float, *saved: Any) -> tuple[Array | None, ...]:
    query, key, value, bias, mask, kept, exponentials, total, y, g = saved
    share = (g / (total * keep).swapaxes(-3, -2)).astype(g.dtype)
    key, value, gradient = _by_heads(key, value, g)
    d_weights = jnp.einsum(
        "...nlv,...nmv->...nlm", gradient, value, preferred_element_type=total.dtype
    )
    d_weights = _where(kept, d_weights / keep)
    d_logits = (exponentials * ((d_weights - _subtracted(y, g)) / total)).astype(query.dtype)
    return _gradients(query, key, bias, mask, d_logits, _where(kept, exponentials), share)


def _weights_backward(keep: float, *saved: Any) -> tuple[Array | None, ...]:
    query, key, value, bias, mask, kept, weights, _, y, g = saved
    key, value, gradient = _by_heads(key, value, g)
    # As autodiff rounds it too.
    d_weights = jnp.einsum("...nlv,...nmv->...nlm", gradient, value)
    d_logits = weights * (d_weights - keep * _subtracted(y, g))
    if kept is not None:
        dropped = weights / TINY * _subtracted(y, g)
        d_logits = jnp.where(weights > 0, d_logits, dropped)
    return _gradients(query, key, bias, mask, d_logits.astype(query.dtype), weights, g)


def _subtracted(y: Array, g: Array) -> Array:
    """Computes ``sum_m g_lm w_lm`` as ``g_l . y_l``: [..., n, l, 1]."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.sum(g.astype(wide) * y.astype(wide), -1)[..., None].swapaxes(-3, -2)


def _gradients(  # noqa: PLR0917
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    d_logits: Array,
    left: Array,
    g: Array,
) -> tuple[Array | None, ...]:
    """Returns the gradients of query, key, value and bias; the key has the heads in front."""
    scale = query.shape[-1] ** -0.5
    d_logits = _where(mask, d_logits)
    # Sums over queries: XLA on CPU is a third faster with the heads behind the positions.
    d_value = jnp.einsum("...nlm,...lnv->...mnv", left, g)
    d_key = jnp.einsum("...nlm,...lnc->...mnc", d_logits, query) * scale
    (d_query,) = _by_heads(jnp.einsum("...nlm,...nmc->...nlc", d_logits, key) * scale)
    d_bias = None
    if bias is not None:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        whole = partial(jnp.broadcast_to, shape=d_logits.shape)
        (d_bias,) = jax.vjp(whole, bias.astype(wide))[1](d_logits.astype(wide))
        d_bias = d_bias.astype(bias.dtype)
    return d_query, d_key, d_value, d_bias


attend_stored.defvjp(_attend_forward, _attend_backward)


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)
