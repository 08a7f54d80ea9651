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

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from localglobal_jax.operators.attention import attend, attention_weights
from localglobal_jax.operators.projection import Projection, project
from localglobal_jax.operators.reach import GLOBAL, Reach
from localglobal_jax.parallel import context

Cache = dict[str, Float[Array, "b ..."]]
Memory = dict[str, Shaped[Array, "s ..."]]  # of s sentences, maybe fewer than rows
Index = Int[Array, ""] | int
FEW = 16  # queries, of all rows together (measured on CPU with 5 and 40)

# ---------------------------------------------------------------------------- functions


def visible(
    mask: Bool[Array, "b l"] | None, length: int, *, causal: bool
) -> Bool[Array, "#b 1 #l l"] | None:
    """Which keys each query may see; None: all."""
    if not causal:
        return None if mask is None else mask[:, None, None, :]
    past = jnp.tril(jnp.ones((length, length), bool))[None]
    if mask is not None:
        past = past & (mask[:, None, :] | jnp.eye(length, dtype=bool)[None])
    return past[:, None]


def visible_at(
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
    return lax.dynamic_update_slice_in_dim(cache, slots(new).astype(cache.dtype), index, axis=2)


def tail(
    cache: Shaped[Array, "b ..."], index: Index, window: int, *, axis: int = 1
) -> Shaped[Array, "b ..."]:
    """The `window` slots that end at `index`, zeros before slot 0: what a causal window sees."""
    at = index - window + 1 + jnp.arange(window)
    there = jnp.expand_dims(at >= 0, [i for i in range(cache.ndim) if i != axis])
    found = jnp.take(cache, jnp.maximum(at, 0), axis=axis)
    return jnp.where(there, found, jnp.zeros((), cache.dtype))


def slots(x: Float[Array, "b i j c"]) -> Float[Array, "b j i c"]:
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


# ---------------------------------------------------------------------------- modules


class Attend(nn.Module):
    """Softmax attention with dropout of its weights; the weights are sown as "attention"."""

    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "b l n c"],
        key: Float[Array, "b m n c"],
        value: Float[Array, "b m n c"],
        *,
        bias: Float[Array, "#b n l m"] | Float[Array, "n l m"] | None = None,
        mask: Bool[Array, "#b 1 #l m"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        drop = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        seen = self.is_mutable_collection("intermediates")
        # For a few queries, as in decoding one sentence, the weights themselves are quicker on CPU:
        # 0.89 of the time for the beams of one, 1.12 for those of eight.
        many = query.shape[0] * query.shape[1] > FEW
        if (train or many) and not seen and context.formulation() == "tuned":
            kept = None
            if train and self.dropout:
                # the numbers that the weights themselves would be dropped by
                shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                kept = drop(jnp.ones(shape, jnp.promote_types(query.dtype, jnp.float32))) != 0
                # Drawn once. Left to itself XLA draws anew in all that reads it: 0.48 of the
                # cycles of this attention with its backward pass (MUSE on WMT, v5e).
                kept = lax.optimization_barrier(kept)
            dropout = self.dropout if train else 0.0
            y = attend(query, key, value, bias=bias, mask=mask, kept=kept, dropout=dropout)
            return y.reshape(*y.shape[:2], -1)
        weights = attention_weights(query, key, bias=bias, mask=mask)
        self.sow("intermediates", "attention", weights)
        y = jnp.einsum("bnlm,bmnc->blnc", drop(weights).astype(value.dtype), value)
        return y.reshape(*y.shape[:2], -1)


class DistanceBias(nn.Module):
    """A free bias per displacement, clipped at `furthest`, and head: ``table [2 furthest + 1, n]``.

    Displacements are query minus key, as in `RelativeBiasTable`; sequences have no largest size.
    May be different ones for every row b.
    """

    heads: int
    furthest: int = 128

    @nn.compact
    def __call__(self, displacement: Int[Array, "*b l m"]) -> Float[Array, "*b n l m"]:
        shape = (2 * self.furthest + 1, self.heads)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        displacement = jnp.clip(displacement, -self.furthest, self.furthest)
        return jnp.moveaxis(table[displacement + self.furthest], -1, -3)


class SelfAttention(nn.Module):
    """Self-attention; with `furthest`, it knows the displacement (CoAtNet, equation 3, in 1-D).

    Attributes:
      features: width of input and output. `heads`: their number.
      causal: no position sees a later one.
      furthest: a bias per displacement up to this one; None: no bias.
      dropout: of the attention weights.
      dtype: of the computation; parameters are float32.
    """

    features: int
    heads: int
    causal: bool = False
    furthest: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    def setup(self) -> None:
        xavier = nn.initializers.xavier_uniform()
        shape = (3, self.heads, head_width(self.features, self.heads))
        self.qkv = Projection(self.features, shape, kernel_init=xavier, name="qkv")
        self.output = Projection(self.features, (self.features,), kernel_init=xavier, name="output")
        self.attend = Attend(self.dropout, name="attend")
        if self.furthest is not None:
            self.bias = DistanceBias(self.heads, self.furthest, name="relative_bias")

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        query, key, value = self._project(x)
        bias = None
        if self.furthest is not None:
            bias = self.bias(self.displacements(x.shape[1], mask))
        mask = visible(mask, x.shape[1], causal=self.causal)
        y = self.attend(query, key, value, bias=bias, mask=mask, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of `length` positions."""
        return key_value_cache(batch, length, self.features, self.heads, self.dtype)

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """The output at position `index`; `valid` says which positions up to it are real."""
        query, key, value = self._project(x)
        cache = {
            "key": append(cache["key"], key, index),
            "value": append(cache["value"], value, index),
        }
        length = cache["key"].shape[2]
        bias = None
        if self.furthest is not None:
            bias = self.bias((index - jnp.arange(length))[None])
        mask = visible_at(index, valid, length)
        y = self.attend(query, slots(cache["key"]), slots(cache["value"]), bias=bias, mask=mask)
        return project(y, [self.output()], dtype=self.dtype)[0], cache

    def displacements(self, length: int, mask: Bool[Array, "b l"] | None) -> Int[Array, "*b l l"]:
        """Query minus key, of all pairs of positions."""
        position = jnp.arange(length)
        return position[:, None] - position[None, :]

    def _project(self, x: Array) -> tuple[Array, ...]:
        (qkv,) = project(x, [self.qkv()], dtype=self.dtype)
        return split_heads(qkv, 3, self.heads)
