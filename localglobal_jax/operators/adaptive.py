# SPDX-License-Identifier: Apache-2.0
"""Two operators between convolution and attention, each with one property of the other.

- Content-adaptive convolution (A): a convolution's window, an attention's weights. LOCAL, with
  input-dependent weights, translation-equivariant as any convolution is.
- Translation-equivariant attention (E): attention whose bias is a function of the displacement
  around a torus. GLOBAL, with input-dependent weights; it commutes exactly with cyclic shifts.

Legend: b batch, l length, h w grid, d width, n heads, c width of a head.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.config import renamed
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
    check_causal,
    key_value_cache,
    last_positions,
    split_heads,
    to_cache_layout,
)
from localglobal_jax.operators.convolution import dynamic
from localglobal_jax.operators.dense import Projection, head_width, project
from localglobal_jax.operators.reach import GLOBAL, Reach, local


def window_padding(window: Sequence[int], *, causal: bool = False) -> tuple[tuple[int, int], ...]:
    """Returns the positions before and after a window's centre; causal: all of them before it."""
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
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "b *space n v"]:
    """``y_i = sum_{j in N(i)} softmax_j(q_i.k_j / sqrt(c) + w_{j-i}) v_j``, N(i) a window around i.

    `dropout` is applied to the weights. For the other arguments see `adaptive_kernel`.

    >>> query = key = value = jnp.ones((2, 8, 8, 4, 16))  # [b, h, w, heads, width of a head]
    >>> bias = jnp.zeros((3, 3, 4))  # a window of 3 x 3
    >>> jax.eval_shape(lg.operators.adaptive_convolution, query, key, value, bias).shape
    (2, 8, 8, 4, 16)
    """
    kernel, window = adaptive_kernel(query, key, bias, causal=causal, mask=mask), bias.shape[:-1]
    kernel = kernel if dropout is None else dropout(kernel)
    joined, padding = lax.collapse(value, value.ndim - 2), window_padding(window, causal=causal)
    return dynamic(joined, kernel, window=window, padding=padding).reshape(value.shape)


def adaptive_kernel(
    query: Float[Array, "b *space n c"],
    key: Float[Array, "b *space n c"],
    bias: Float[Array, "*window _"],
    *,
    causal: bool = False,
    mask: Bool[Array, " b *space"] | None = None,
) -> Float[Array, "b *space n k"]:
    """Returns the weights of every position for its window, in the layout of `dynamic`.

    They sum to one.

    `bias` is w, [*window, n], row by row from the first position before i. Positions outside the
    grid, and those where `mask` is False, get no weight; a window of such positions alone weighs
    all alike. `causal` (sequences): windows end at i.

    >>> query = key = jnp.ones((1, 3, 1, 2))
    >>> kernel = lg.operators.adaptive_kernel(query, key, jnp.zeros((3, 1)))
    >>> [f"{weight:.2f}" for weight in kernel[0, 0, 0]]  # nothing is left of the first position
    ['0.00', '0.50', '0.50']
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
    """Returns ``table[(qy - ky) mod h, (qx - kx) mod w]`` for all pairs of an h x w grid.

    >>> table = jnp.arange(3.0).reshape(3, 1, 1)  # a sequence of 3 is a grid of 3 x 1
    >>> lg.operators.cyclic_bias(table)[0].tolist()
    [[0.0, 2.0, 1.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]]
    """
    height, width, _ = table.shape
    # Displacements -(h-1) .. h-1 in order are the table's rows 1 .. h-1, 0, 1 .. h-1.
    table = jnp.concatenate([table[1:], table], 0)
    table = jnp.concatenate([table[:, 1:], table], 1)
    return relative_bias(table, height, width)


class AdaptiveConv(nn.Module):
    """Content-adaptive convolution over a sequence [b, l, d] or a grid [b, h, w, d].

    A position attends to the window around it, with a bias per displacement. Padding gets no
    weight.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of all together; None: `features`.
      window: its side; the same in every space dimension.
      causal: the window ends at the position itself (sequences).
      use_bias: of the two projections.
      dropout: of the weights.
      dtype: of the computation; parameters are float32, the softmax at least that.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.AdaptiveConv(32, heads=4, window=5)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, str(module.reach)
    ((2, 8, 8, 32), 'LOCAL 2')
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    window: int = 7
    causal: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window - 1 if self.causal else self.window // 2)

    def __call__(
        self,
        x: Float[Array, "b *space d"],
        *,
        mask: Bool[Array, " b *space"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *space e"]:
        def convolve(query: Array, key: Array, value: Array, bias: Array) -> Array:
            drop = nn.Dropout(self.dropout, deterministic=not train, name="drop")
            return adaptive_convolution(
                query, key, value, bias, causal=self.causal, mask=mask, dropout=drop
            )

        return self._between_projections(x, convolve)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache of the window's past keys and values; `length` is not used."""
        check_causal(self)
        width = self.width or self.features
        if width is None:
            raise ValueError("AdaptiveConv.init_cache: features=None; give the width of the input")
        return key_value_cache(batch, self.window - 1, width, self.heads, self.dtype)

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b 1 e"], Cache]:
        """Returns the output at position `index`; `valid` is False at padding up to there."""
        check_causal(self)
        seen = (jnp.arange(self.window) >= self.window - 1 - index)[None]
        if valid is not None:
            seen = last_positions(valid, index, self.window)
        new: Cache = {}

        def convolve(query: Array, key: Array, value: Array, bias: Array) -> Array:
            key = jnp.concatenate([to_cache_layout(cache["key"]), key], 1)
            value = jnp.concatenate([to_cache_layout(cache["value"]), value], 1)
            new["key"], new["value"] = to_cache_layout(key[:, 1:]), to_cache_layout(value[:, 1:])
            mask = seen[:, None, None, :]
            return Attend(name="attend")(query, key, value, bias=bias.T[:, None], mask=mask)

        return self._between_projections(x, convolve), new

    @nn.compact
    def _between_projections(self, x: Array, convolve: Callable[..., Array]) -> Array:
        """Applies ``convolve(query, key, value, bias)`` between the two projections."""
        grids.check_input(self, x, "b l d", "b h w d", parameter="bias")
        features = self.features or x.shape[-1]
        width = self.width or features
        if x.ndim == 3:
            # One matrix for all heads: with an axis for heads, as on grids, a train step of MUSE's
            # layout "AA" read and wrote 12 % more bytes.
            inner = (3, self.heads, head_width(width, self.heads))
            xavier = nn.initializers.xavier_uniform()
            qkv = Projection(x.shape[-1], inner, self.use_bias, xavier, name="qkv")
            (joined,) = project(x, [qkv()], dtype=self.dtype)
            query, key, value = split_heads(joined, 3, self.heads)
        else:
            query, key, value = project_heads(x, self.heads, width, self.use_bias, self.dtype)
        shape = (self.window,) * (x.ndim - 2) + (self.heads,)
        bias = self.param("bias", nn.initializers.normal(0.02), shape, jnp.float32)
        y = convolve(query, key, value, bias).reshape(query.shape)
        return join_heads(y, features, self.use_bias, self.dtype)


class EquivariantAttention(nn.Module):
    """Self-attention with a bias per displacement modulo the size: ``bias [*space, n]``.

    All positions are alike: rolling the input rolls the output and changes nothing else. An image
    is not a torus. There the far edge is a neighbour of the near one, because -1 and h - 1 are the
    same displacement; and if a shift moves content over an edge, only the content that stays inside
    moves along. If that hurts, pad the grid on one side by the largest displacement that matters,
    or use `AdaptiveConv`. The table fits one grid size. Fields as in `AdaptiveConv`.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.EquivariantAttention(16, heads=2)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> variables["params"]["bias"].shape  # a bias per displacement and head
    (8, 8, 2)
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
        grids.check_input(self, x, "b l d", "b h w d", parameter="bias")
        features = self.features or x.shape[-1]
        width = self.width or features
        space = x.shape[1:-1]
        sequence = grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.use_bias, self.dtype)
        table = self.param("bias", nn.initializers.normal(0.02), (*space, self.heads), jnp.float32)
        bias = cyclic_bias(table.reshape(space[0], -1, self.heads))  # a sequence is a grid l x 1
        show(self, query, key, bias)
        y = attend(query, key, value, bias=bias)
        y = join_heads(y, features, self.use_bias, self.dtype)
        return grids.sequence_to_grid(y, space)


def ring_displacements(mask: Bool[Array, "b l"]) -> Int[Array, "b l l"]:
    """Returns query minus key, the shorter way round the ring of every row's real tokens.

    Of n tokens, the first follows the last: displacements are modulo n, from ``-(n // 2)`` on.
    Padding is not on the ring. So rolling a row together with its mask rolls both axes, at every
    length and for every place of the padding.

    >>> lg.operators.ring_displacements(jnp.ones((1, 4), bool))[0].tolist()
    [[0, -1, -2, 1], [1, 0, -1, -2], [-2, 1, 0, -1], [-1, -2, 1, 0]]
    """
    count = jnp.maximum(mask.sum(1), 1)[:, None, None]
    rank = jnp.cumsum(mask, 1)
    displacement = rank[:, :, None] - rank[:, None, :]
    return (displacement + count // 2) % count - count // 2


class EquivariantSequence(SelfAttention):
    """Translation-equivariant attention: a bias per displacement, clipped at `furthest`.

    In an encoder the tokens of a sentence form a ring without a first token. Rolling the sentence
    rolls the output and changes nothing else, as with `EquivariantAttention` on its torus, but for
    sentences of every length and for every place of the padding. A causal sequence has a beginning,
    so there this is relative attention (T).

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.operators.EquivariantSequence(16, heads=2, furthest=3)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> variables["params"]["relative_bias"]["table"].shape
    (7, 2)
    """

    furthest: int | None = 128

    def displacements(self, length: int, mask: Bool[Array, "b l"] | None) -> Int[Array, "*b l l"]:
        if self.causal:
            return super().displacements(length, mask)
        return ring_displacements(jnp.ones((1, length), bool) if mask is None else mask)


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
