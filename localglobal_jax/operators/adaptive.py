# SPDX-License-Identifier: Apache-2.0
"""Two operators between convolution and attention, each with one property of the other.

- Content-adaptive convolution (A): a convolution's window, an attention's weights. LOCAL, weights
  made from the content, translation-equivariant as any convolution is.
- Translation-equivariant attention (E): attention whose bias is a function of the displacement
  around a torus. GLOBAL, weights made from the content, and it commutes exactly with cyclic shifts.

Legend: b batch, l length, h w grid, d width, n heads, c width of a head.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.operators import grids
from localglobal_jax.operators.attention import (
    Attend,
    SelfAttention,
    attend,
    join_heads,
    project_heads,
    relative_bias,
    show,
)
from localglobal_jax.operators.cache import (
    Cache,
    Index,
    head_width,
    key_value_cache,
    last_positions,
    split_heads,
    to_cache_layout,
)
from localglobal_jax.operators.convolution import dynamic
from localglobal_jax.operators.dense import Projection, project
from localglobal_jax.operators.reach import GLOBAL, Reach, local


def window_padding(window: Sequence[int], *, causal: bool = False) -> tuple[tuple[int, int], ...]:
    """How many positions before and after a window's own one: k // 2, or all of them before it."""
    if causal:
        return tuple((k - 1, 0) for k in window)
    return tuple((k // 2, k - 1 - k // 2) for k in window)


def adaptive_convolution(
    query: Float[Array, "b *space n c"],
    key: Float[Array, "b *space n c"],
    value: Float[Array, "b *space n v"],
    bias: Float[Array, "*window _"],
    *,
    causal: bool = False,
    mask: Bool[Array, " b *space"] | None = None,
) -> Float[Array, "b *space n v"]:
    """``y_i = sum_{j in N(i)} softmax_j(q_i.k_j / sqrt(c) + w_{j-i}) v_j``, N(i) a window around i.

    For the arguments, and what gets no weight, see `adaptive_kernel`.
    """
    kernel, window = adaptive_kernel(query, key, bias, causal=causal, mask=mask), bias.shape[:-1]
    joined, padding = value.reshape(*value.shape[:-2], -1), window_padding(window, causal=causal)
    return dynamic(joined, kernel, window=window, padding=padding).reshape(value.shape)


def adaptive_kernel(
    query: Float[Array, "b *space n c"],
    key: Float[Array, "b *space n c"],
    bias: Float[Array, "*window _"],
    *,
    causal: bool = False,
    mask: Bool[Array, " b *space"] | None = None,
) -> Float[Array, "b *space n k"]:
    """The weights of every position for its window, as `dynamic` takes them; they sum to one.

    `bias` is w, [*window, n], row by row from the first position before i. Positions outside the
    grid, and those where `mask` is False, get no weight. `causal` (sequences): windows end at i.
    """
    window = bias.shape[:-1]
    if len(window) != query.ndim - 3 or (causal and len(window) != 1):
        raise ValueError(
            f"adaptive_convolution: bias {bias.shape} with query {query.shape}: a bias "
            "[*window, heads] has one window dimension per space dimension; causal, exactly one"
        )
    padding = window_padding(window, causal=causal)
    inside = jnp.ones(query.shape[:-2], bool) if mask is None else mask
    scaled = query * query.shape[-1] ** -0.5
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Shifted slices here and, after the softmax, in `dynamic`. A single pass with a running maximum
    # needs no logits at once, but differentiating it keeps every partial sum of the values: window
    # x width numbers per position instead of window x heads.
    logits = []
    for w, near, k in zip(
        bias.reshape(math.prod(window), -1),
        grids.shifted(inside, window, padding),
        grids.shifted(key, window, padding),
        strict=True,
    ):
        logit = (scaled * k).sum(-1, dtype=wide)
        logit = logit + grids.per_channel(w.astype(wide), logit)
        logits.append(jnp.where(near[..., None], logit, jnp.finfo(wide).min))
    kernel = jax.nn.softmax(jnp.stack(logits), axis=0).astype(query.dtype)
    return jnp.moveaxis(kernel, 0, -1)


def cyclic_bias(table: Float[Array, "h w n"]) -> Float[Array, "n l l"]:
    """``table[(qy - ky) mod h, (qx - kx) mod w]`` for all pairs of positions of an h x w grid."""
    height, width, _ = table.shape
    # Displacements -(h-1) .. h-1 in order are the table's rows 1 .. h-1, 0, 1 .. h-1.
    table = jnp.concatenate([table[1:], table], 0)
    table = jnp.concatenate([table[:, 1:], table], 1)
    return relative_bias(table, height, width)


class AdaptiveConv(nn.Module):
    """Content-adaptive convolution over a sequence [b, l, d] or a grid [b, h, w, d].

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of all together; None: `features`.
      window: its side; the same in every space dimension.
      causal: the window ends at the position itself (sequences).
      use_bias: of the two projections.
      dtype: of the computation; parameters are float32, the softmax at least that.
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    window: int = 7
    causal: bool = False
    use_bias: bool = True
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window - 1 if self.causal else self.window // 2)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space d"],
        *,
        mask: Bool[Array, " b *space"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *space e"]:
        features = self.features or x.shape[-1]
        width = self.width or features
        query, key, value = project_heads(x, self.heads, width, self.use_bias, self.dtype)
        shape = (self.window,) * (x.ndim - 2) + (self.heads,)
        bias = self.param("bias", nn.initializers.normal(0.02), shape)
        y = adaptive_convolution(query, key, value, bias, causal=self.causal, mask=mask)
        return join_heads(y, features, self.use_bias, self.dtype)


class EquivariantAttention(nn.Module):
    """Self-attention with a bias per displacement modulo the size: ``bias [*space, n]``.

    No position is special, so rolling the input rolls the output and changes nothing else. On a
    picture, which is no torus, this means: the far edge is a neighbour of the near one (moving by
    -1 and by h - 1 are one displacement), and a shift that pushes content over an edge is not a
    cyclic shift, so only what stays inside moves along. Where that hurts, pad the grid on one side
    by the largest displacement that matters, or use a `AdaptiveConv`. The table belongs to one grid
    size. Fields as in `AdaptiveConv`.
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    use_bias: bool = True
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space d"], *, train: bool = False
    ) -> Float[Array, "b *space e"]:
        features = self.features or x.shape[-1]
        width = self.width or features
        space = x.shape[1:-1]
        sequence = grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.use_bias, self.dtype)
        table = self.param("bias", nn.initializers.normal(0.02), (*space, self.heads))
        bias = cyclic_bias(table.reshape(space[0], -1, self.heads))  # a sequence is a grid l x 1
        show(self, query, key, bias)
        y = attend(query, key, value, bias=bias)
        y = join_heads(y, features, self.use_bias, self.dtype)
        return grids.sequence_to_grid(y, space)


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
        key = jnp.concatenate([to_cache_layout(cache["key"]), key], 1)
        value = jnp.concatenate([to_cache_layout(cache["value"]), value], 1)
        seen = (jnp.arange(self.window) >= self.window - 1 - index)[None]
        if valid is not None:
            seen = last_positions(valid, index, self.window)
        y = self.attend(query, key, value, bias=self.bias.T[:, None], mask=seen[:, None, None, :])
        y = project(y, [self.output()], dtype=self.dtype)[0]
        return y, {"key": to_cache_layout(key[:, 1:]), "value": to_cache_layout(value[:, 1:])}

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
