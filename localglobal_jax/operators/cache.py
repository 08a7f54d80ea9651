# SPDX-License-Identifier: Apache-2.0
"""Operators over sequences: all positions at once, or one after the other with a cache.

Every operator here is called as ``operator(x [b, l, d], mask=..., train=...) -> [b, l, d]``. A
causal one also has ``init_cache(batch, length)`` and ``step(x [b, 1, d], cache, index, valid=...)
-> (y [b, 1, d], cache)``; steps 0, 1, .. give what one call gives for the whole sequence. A cache
is a dict of arrays whose axis 0 is the batch, passed in and returned, never hidden; keys and values
lie in it as [b, n, m, c].

Masks are True at real positions, False at padding. Causal attention also lets every position see
itself, so that padding before the beginning has something to attend to.

Legend: b batch, l m lengths, d width, n heads, c width of a head.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

Cache = dict[str, Float[Array, "b ..."]]
CrossKV = dict[str, Shaped[Array, "s ..."]]  # of s sentences, maybe fewer than rows
Index = Int[Array, ""] | int

# ---------------------------------------------------------------------------- functions


def attention_mask(
    mask: Bool[Array, "b l"] | None, length: int, *, causal: bool
) -> Bool[Array, "#b 1 #l l"] | None:
    """Which keys each query may see; None: all."""
    if not causal:
        return None if mask is None else mask[:, None, None, :]
    past = jnp.tril(jnp.ones((length, length), bool))[None]
    if mask is not None:
        past = past & (mask[:, None, :] | jnp.eye(length, dtype=bool)[None])
    return past[:, None]


def attention_mask_at(
    index: Index, valid: Bool[Array, "b m"] | None, length: int
) -> Bool[Array, "#b 1 1 m"]:
    """Which slots of a cache the query at `index` may see."""
    slots = jnp.arange(length)[None]
    seen = slots <= index
    if valid is not None:
        seen = seen & (valid | (slots == index))
    return seen[:, None, None, :]


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
    """The `window` slots that end at `index`, zeros before slot 0: what a causal window sees."""
    at = index - window + 1 + jnp.arange(window)
    there = jnp.expand_dims(at >= 0, [i for i in range(cache.ndim) if i != axis])
    found = jnp.take(cache, jnp.maximum(at, 0), axis=axis)
    return jnp.where(there, found, jnp.zeros((), cache.dtype))


def to_cache_layout(x: Float[Array, "b i j c"]) -> Float[Array, "b j i c"]:
    """[b, m, n, c] as a cache holds it, [b, n, m, c], and back.

    Products of heads then read the slots as they lie; the other order was transposed whole by XLA
    on CPU at every step, a third of the time of a batch of sentences.
    """
    return x.swapaxes(1, 2)


def zero_padding(
    x: Float[Array, "b l ..."], mask: Bool[Array, "b l"] | None
) -> Float[Array, "b l ..."]:
    """Zeros where `mask` is False."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def head_width(features: int, heads: int) -> int:
    """Width of one head; ValueError where they do not divide."""
    if features % heads:
        raise ValueError(f"attention: width {features} is not divisible by {heads} heads")
    return features // heads


def split_heads(x: Float[Array, "b l _"], parts: int, heads: int) -> tuple[Array, ...]:
    """[b, l, parts * n * c] -> `parts` arrays [b, l, n, c]."""
    x = x.reshape(*x.shape[:2], parts, heads, -1)
    return tuple(x[:, :, i] for i in range(parts))


def key_value_cache(batch: int, length: int, features: int, heads: int, dtype: str) -> Cache:
    """Empty slots for `length` keys and values."""
    shape = (batch, heads, length, head_width(features, heads))
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def valid_at(valid: Bool[Array, "b m"], index: Index) -> Bool[Array, "b 1"]:
    """Column `index`."""
    return lax.dynamic_slice_in_dim(valid, index, 1, axis=1)
