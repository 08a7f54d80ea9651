# SPDX-License-Identifier: Apache-2.0
"""Operators over sequences: all positions at once, or one after the other with a cache.

Every operator over sequences is called as ``operator(x [b, l, d], mask=..., train=...)`` and
returns [b, l, d]. A causal one also has ``init_cache(batch, length)`` and ``step(x [b, 1, d],
cache, index, valid=...) -> (y [b, 1, d], cache)``; steps 0, 1, .. give the output of one call on
the whole sequence. A cache is a dict of arrays whose axis 0 is the batch, passed in and returned.
It stores keys and values as [b, n, m, c].

Masks are True at real positions, False at padding. In causal attention every position also attends
to itself, so that padding before the beginning has a key.

Legend: b batch, l m lengths, d width, n heads, c width of a head.

>>> layer = lg.operators.SelfAttention(16, heads=2, causal=True)
>>> x = jnp.ones((2, 6, 16))
>>> def decode(x):
...     variables = layer.init(jax.random.key(0), x)
...     cache = layer.init_cache(batch=2, length=6)
...     return layer.apply(variables, x[:, :1], cache, 0, method="step")
>>> y, cache = jax.eval_shape(decode, x)
>>> y.shape, cache["key"].shape
((2, 1, 16), (2, 2, 6, 8))
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from localglobal_jax.operators.dense import head_width

Cache = dict[str, Float[Array, "b ..."]]
CrossKV = dict[str, Shaped[Array, "s ..."]]  # of s sentences, maybe fewer than rows
Index = Int[Array, ""] | int

# ---------------------------------------------------------------------------- functions


def attention_mask(
    mask: Bool[Array, "b l"] | None, length: int, *, causal: bool
) -> Bool[Array, "#b 1 #l l"] | None:
    """Returns the keys that each query may attend to; None: all."""
    if not causal:
        return None if mask is None else mask[:, None, None, :]
    past = jnp.tril(jnp.ones((length, length), bool))[None]
    if mask is not None:
        past = past & (mask[:, None, :] | jnp.eye(length, dtype=bool)[None])
    return past[:, None]


def attention_mask_at(
    index: Index, valid: Bool[Array, "b m"] | None, length: int
) -> Bool[Array, "#b 1 1 m"]:
    """Returns the slots of a cache that the query at `index` may attend to."""
    slots = jnp.arange(length)[None]
    seen = slots <= index
    if valid is not None:
        seen = seen & (valid | (slots == index))
    return seen[:, None, None, :]


def check_causal(module: nn.Module) -> None:
    """Raises ValueError for the steps of a module that also looks ahead."""
    if not module.causal:
        raise ValueError(f"{type(module).__name__}: causal=False has no steps: give causal=True")


def check_memory(features: int | None, memory: Any) -> None:
    """Raises ValueError for a `memory` that a module of these `memory_features` would not read."""
    if memory is not None and features is None:
        raise ValueError(
            "memory_features=None reads no memory: give the width of the encoder's output"
        )


def append(
    cache: Float[Array, "b n m c"], new: Float[Array, "b 1 n c"], index: Index
) -> Float[Array, "b n m c"]:
    """Writes `new` into slot `index` of a cache of keys or values."""
    return lax.dynamic_update_slice_in_dim(
        cache, to_cache_layout(new).astype(cache.dtype), index, axis=2
    )


def last_positions(
    cache: Shaped[Array, "b ..."], index: Index, window: int, *, axis: int = 1
) -> Shaped[Array, "b ..."]:
    """Returns the causal window: the `window` slots that end at `index`, zeros before slot 0."""
    at = index - window + 1 + jnp.arange(window)
    there = jnp.expand_dims(at >= 0, [i for i in range(cache.ndim) if i != axis])
    found = jnp.take(cache, jnp.maximum(at, 0), axis=axis)
    return jnp.where(there, found, jnp.zeros((), cache.dtype))


def to_cache_layout(x: Float[Array, "b i j c"]) -> Float[Array, "b j i c"]:
    """Transposes [b, m, n, c] to the layout of a cache, [b, n, m, c], and back.

    Products per head then read contiguous slots. XLA on CPU transposed the other order at every
    step, a third of the time of a batch of sentences.
    """
    return x.swapaxes(1, 2)


def zero_padding(
    x: Float[Array, "b l ..."], mask: Bool[Array, "b l"] | None
) -> Float[Array, "b l ..."]:
    """Replaces positions where `mask` is False by zeros."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def split_heads(x: Float[Array, "b l _"], parts: int, heads: int) -> tuple[Array, ...]:
    """Splits [b, l, parts * n * c] into `parts` arrays [b, l, n, c]."""
    x = x.reshape(*x.shape[:2], parts, heads, x.shape[2] // (parts * heads))
    return tuple(x[:, :, i] for i in range(parts))


def key_value_cache(batch: int, length: int, features: int, heads: int, dtype: str) -> Cache:
    """Returns empty slots for `length` keys and values."""
    shape = (batch, heads, length, head_width(features, heads))
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def valid_at(valid: Bool[Array, "b m"], index: Index) -> Bool[Array, "b 1"]:
    """Returns column `index`."""
    return lax.dynamic_slice_in_dim(valid, index, 1, axis=1)
