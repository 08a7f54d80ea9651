# SPDX-License-Identifier: Apache-2.0
"""The two operators of `adaptive` over sequences, with the edges of `sequence`.

- Content-adaptive convolution (A): attention inside a window. LOCAL.
- Translation-equivariant attention (E): attention that knows no more of two tokens than the way
  from one to the other. GLOBAL.

Legend: b batch, l m lengths, d width, n heads, k positions of the window.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.operators.adaptive import adaptive_kernel, window_padding
from localglobal_jax.operators.cache import (
    Attend,
    Cache,
    Index,
    SelfAttention,
    head_width,
    key_value_cache,
    slots,
    split_heads,
    tail,
)
from localglobal_jax.operators.convolution import dynamic
from localglobal_jax.operators.projection import Projection, project
from localglobal_jax.operators.reach import Reach, local

# ---------------------------------------------------------------------------- functions


def ring_displacements(mask: Bool[Array, "b l"]) -> Int[Array, "b l l"]:
    """Query minus key the shorter way round the ring that every row's real tokens make.

    Of n tokens, the first follows the last: displacements are modulo n, from ``-(n // 2)`` on.
    Padding is not on the ring. So rolling a row together with its mask rolls both axes, whatever
    the length and wherever the padding ends up.
    """
    count = jnp.maximum(mask.sum(1), 1)[:, None, None]
    rank = jnp.cumsum(mask, 1)
    displacement = rank[:, :, None] - rank[:, None, :]
    return (displacement + count // 2) % count - count // 2


# ---------------------------------------------------------------------------- modules


class AdaptiveSequence(nn.Module):
    """Content-adaptive convolution: a position attends to its window, with a bias per place in it.

    Padding gets no weight.

    Attributes:
      features: width of input and output. `heads`: their number.
      window: positions that one sees. `causal`: they end at the position itself; else around it.
      dropout: of the weights.
      dtype: of the computation; parameters are float32.
    """

    features: int
    heads: int
    window: int = 7
    causal: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window - 1 if self.causal else self.window // 2)

    def setup(self) -> None:
        xavier, d = nn.initializers.xavier_uniform(), self.features
        shape = (3, self.heads, head_width(d, self.heads))
        self.qkv = Projection(d, shape, kernel_init=xavier, name="qkv")
        self.output = Projection(d, (d,), kernel_init=xavier, name="output")
        self.bias = self.param("bias", nn.initializers.normal(0.02), (self.window, self.heads))
        self.drop = nn.Dropout(self.dropout)
        self.attend = Attend(name="attend")

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        query, key, value = self._project(x)
        kernel = adaptive_kernel(query, key, self.bias, causal=self.causal, mask=mask)
        kernel = self.drop(kernel, deterministic=not train)
        window = (self.window,)
        padding = window_padding(window, causal=self.causal)
        y = dynamic(value.reshape(x.shape), kernel, window=window, padding=padding)
        return project(y, [self.output()], dtype=self.dtype)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Keys and values that the window still sees of the past; `length` does not matter."""
        return key_value_cache(batch, self.window - 1, self.features, self.heads, self.dtype)

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
        key = jnp.concatenate([slots(cache["key"]), key], 1)
        value = jnp.concatenate([slots(cache["value"]), value], 1)
        seen = (jnp.arange(self.window) >= self.window - 1 - index)[None]
        if valid is not None:
            seen = tail(valid, index, self.window)
        y = self.attend(query, key, value, bias=self.bias.T[:, None], mask=seen[:, None, None, :])
        y = project(y, [self.output()], dtype=self.dtype)[0]
        return y, {"key": slots(key[:, 1:]), "value": slots(value[:, 1:])}

    def _project(self, x: Array) -> tuple[Array, ...]:
        (qkv,) = project(x, [self.qkv()], dtype=self.dtype)
        return split_heads(qkv, 3, self.heads)


class EquivariantSequence(SelfAttention):
    """Translation-equivariant attention: a bias per displacement, clipped at `furthest`.

    In an encoder the tokens of a sentence make a ring: no token is the first, and rolling the
    sentence rolls the output and changes nothing else, as `EquivariantAttention` does on its torus,
    but for sentences of every length, and wherever padding stands. A causal one has a beginning and
    no way round: there it is relative attention (T), which moves along when everything moves.
    """

    furthest: int | None = 128

    def displacements(self, length: int, mask: Bool[Array, "b l"] | None) -> Int[Array, "*b l l"]:
        if self.causal:
            return super().displacements(length, mask)
        return ring_displacements(jnp.ones((1, length), bool) if mask is None else mask)
