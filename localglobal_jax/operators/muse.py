# SPDX-License-Identifier: Apache-2.0
"""MUSE: attention, convolution and a pointwise net side by side, summed (arXiv 1911.09483).

``Attention(x) + Conv(x) + FFN(x)``, all of the same x. The convolution reads attention's value
projection, and both share one output projection.

Legend: b batch, d width, n heads, c width of a head, k positions of a kernel's window.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from localglobal_jax.config import renamed
from localglobal_jax.operators import grids
from localglobal_jax.operators.activations import ACTIVATIONS, Activation
from localglobal_jax.operators.attention import (
    Attend,
    CrossAttention,
    RelativeBiasTable,
    attend,
    project_heads,
    show,
)
from localglobal_jax.operators.cache import (
    Cache,
    CrossKV,
    Index,
    append,
    attention_mask,
    attention_mask_at,
    check_causal,
    check_memory,
    key_value_cache,
    last_positions,
    split_heads,
    to_cache_layout,
    valid_at,
    zero_padding,
)
from localglobal_jax.operators.convolution import Kind, SharedValueConv
from localglobal_jax.operators.dense import (
    WIDE_UNIFORM,
    Dense,
    Projection,
    head_width,
    project,
    project_to_one,
)
from localglobal_jax.operators.reach import GLOBAL, Reach
from localglobal_jax.parallel import context


class Muse(nn.Module):
    """The parallel sum over a grid [b, h, w, d]; attention has a bias per displacement.

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads. `width`: inner width of attention; None: `features`.
      windows, dynamic: of the convolution, see `SharedValueConv`; no windows: MUSE-simple.
      hidden: of the pointwise net; 0: none.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.Muse(32, heads=4, windows=(3, 5), hidden=64)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, sorted(variables["params"])
    ((2, 8, 8, 32), ['convolution', 'hidden', 'output', 'pointwise', 'qkv', 'relative_bias'])
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    windows: tuple[int, ...] = (3, 7)
    dynamic: bool = True
    hidden: int = 0
    use_bias: bool = True
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        grids.check_input(self, x, "b h w d")
        b, h, w, d = x.shape
        features = self.features or d
        width = self.width or features
        sequence = grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.use_bias, self.dtype)
        bias = RelativeBiasTable(self.heads, name="relative_bias")(h, w)
        show(self, query, key, bias)
        branches = [attend(query, key, value, bias=bias).reshape(b, h, w, width)]
        if self.windows:
            kind: Kind = "dynamic" if self.dynamic else "depthwise"
            conv = SharedValueConv(
                self.heads, self.windows, kind, dtype=self.dtype, name="convolution"
            )
            branches.append(conv(value.reshape(b, h, w, width)))
        xavier = nn.initializers.xavier_uniform()
        dense = partial(Dense, dtype=self.dtype, kernel_init=xavier)
        y = dense(features, use_bias=self.use_bias, name="output")(jnp.concatenate(branches, -1))
        if self.hidden:
            pointwise = ACTIVATIONS["gelu"](dense(self.hidden, name="hidden")(x))
            y = y + dense(features, name="pointwise")(pointwise)
        return y


def apart(x: Array) -> Array:
    """Returns x behind a barrier, so that XLA on GPU does not merge its products with others of x.

    In training merging costs more than it saves: the merged output is
    split, the gradients are joined in memory, and cuBLAS cannot apply the ReLU of one of them.
    """
    if not context.is_fused():
        return x
    return context.per_platform(x, cuda=lax.optimization_barrier, default=lambda x: x)


Source = Literal["shared", "separate"]
Pointwise = Literal["own", "shared", "off"]


class MuseSequence(nn.Module):
    """The sum of all branches of a layer. The convolution reads the end of the value cache.

    Attributes:
      features: width of input and output. `heads`: of both attentions and of the kernels.
      windows, kind, gate: of the convolutions, see `SharedValueConv`; no windows: MUSE-simple.
      projection: the input of the convolution: attention's value projection ("shared"), or a
        projection of its own ("separate"; table 6 of the paper).
      ffn: "own": a pointwise net of width `hidden`; "shared": its input matrix is the one that the
        convolution reads from (table 7); "off": none.
      causal: no position sees a later one, and windows end at the position.
      memory_features: width of the cross-attention's sequence; None: no cross-attention.
      zero_padding: values at padding are zeroed before the convolution, so that results
        do not depend on the amount of padding. In the published code they do.
      fused: all input matrices as one, all output matrices as one. The same numbers; where dropout
        has to come between them (training), the products stay apart.
      dropout: of every branch. `attention_dropout`: of attention weights. `kernel_dropout`: of
        dynamic kernels. `input_dropout`: of the input of self-attention and convolution.
        `activation_dropout`: inside the pointwise net.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.operators.MuseSequence(16, heads=2, hidden=32)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> sorted(variables["params"])
    ['convolution', 'hidden', 'output', 'pointwise', 'qkv']
    """

    features: int
    heads: int
    hidden: int = 0
    windows: tuple[int, ...] = (3, 15)
    kind: Kind = "dynamic"
    gate: bool = True
    projection: Source = "shared"
    ffn: Pointwise = "own"
    activation: Activation = "relu"
    causal: bool = False
    memory_features: int | None = None
    zero_padding: bool = True
    fused: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel_dropout: float = 0.1
    input_dropout: float = 0.0
    activation_dropout: float = 0.0
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    def setup(self) -> None:
        d = self.features
        shape = (3, self.heads, head_width(d, self.heads))
        self.qkv = Projection(d, shape, name="qkv")
        self.attend = Attend(self.attention_dropout, name="attend")
        width = d
        if self.windows:
            if self.projection == "separate":
                self.source = Projection(d, (d,), name="source")
            self.convolution = SharedValueConv(
                self.heads,
                self.windows,
                self.kind,
                gate=self.gate,
                causal=self.causal,
                dropout=self.kernel_dropout,
                dtype=self.dtype,
                name="convolution",
            )
            width += d * (1 if self.gate else len(self.windows))
        self.output = Projection(width, (d,), kernel_init=WIDE_UNIFORM, name="output")
        if self.ffn == "own":
            if self.hidden < 1:
                raise ValueError(f'muse: hidden={self.hidden}: give a width, or ffn="off"')
            self.hidden_layer = Projection(d, (self.hidden,), name="hidden")
        if self.ffn != "off":
            inner = self.hidden if self.ffn == "own" else d
            self.pointwise = Projection(inner, (d,), name="pointwise")
        if self.memory_features is not None:
            self.cross = CrossAttention(
                d,
                self.heads,
                self.memory_features,
                self.attention_dropout,
                input_init=self.qkv.kernel_init,
                output_init=WIDE_UNIFORM,
                dtype=self.dtype,
                name="cross",
            )
        self.drop = nn.Dropout(self.dropout)
        self.drop_input = nn.Dropout(self.input_dropout)
        self.drop_activation = nn.Dropout(self.activation_dropout)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        memory: CrossKV | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        grids.check_input(self, x, "b l d")
        query, key, value, source, rest = self._project(x, train)
        if self.zero_padding:
            value, source = zero_padding(value, mask), zero_padding(source, mask)
        seen = attention_mask(mask, x.shape[1], causal=self.causal)
        attention = self.attend(query, key, value, mask=seen, train=train)
        convolution = self.convolution(source, train=train) if self.windows else None
        return self._sum(attention, convolution, source, rest, memory, train)

    def precompute_kv(self, encoded: Float[Array, "b m e"], mask: Bool[Array, "b m"]) -> CrossKV:
        """Returns the keys and values of the other sequence for the cross-attention."""
        check_memory(self.memory_features, encoded)
        return self.cross.precompute_kv(encoded, mask)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Allocates the cache of `length` positions, with the window of a separate projection."""
        check_causal(self)
        cache = key_value_cache(batch, length, self.features, self.heads, self.dtype)
        if self.windows and self.projection == "separate":
            shape = (batch, max(self.windows) - 1, self.features)
            cache["window"] = jnp.zeros(shape, self.dtype)
        return cache

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
        memory: CrossKV | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """Returns the output at position `index`; `valid` is False at padding up to there."""
        check_causal(self)
        query, key, value, source, rest = self._project(x, False)
        if self.zero_padding and valid is not None:
            here = valid_at(valid, index)
            value, source = zero_padding(value, here), zero_padding(source, here)
        cache = {
            **cache,
            "key": append(cache["key"], key, index),
            "value": append(cache["value"], value, index),
        }
        seen = attention_mask_at(index, valid, cache["key"].shape[2])
        attention = self.attend(
            query, to_cache_layout(cache["key"]), to_cache_layout(cache["value"]), mask=seen
        )
        convolution = None
        if "window" in cache:
            window = jnp.concatenate([cache["window"], source], 1)
            cache["window"] = window[:, 1:]
            convolution = self.convolution(window, last=True)
        elif self.windows:
            window = to_cache_layout(
                last_positions(cache["value"], index, max(self.windows), axis=2)
            )
            convolution = self.convolution(lax.collapse(window, 2), last=True)
        return self._sum(attention, convolution, source, rest, memory, False), cache

    def _project(self, x: Array, train: bool) -> tuple[Array, Array, Array, Array, list[Array]]:
        """Returns query, key, value by heads, the convolution's input, and inputs of `_sum`."""
        noised, clean = [self.qkv()], []  # layers with and without dropout of their input
        separate = self.windows and self.projection == "separate"
        if separate:
            noised.append(self.source())
        if self.ffn == "own":
            clean.append(self.hidden_layer())
        if self.memory_features is not None:
            clean.append(self.cross.query())
        if self.fused and not (train and self.input_dropout):
            qkv, *rest = project(x, noised + clean, fused=True, dtype=self.dtype)
        else:
            dropped = self.drop_input(x, deterministic=not train)
            qkv, *rest = project(dropped, noised, dtype=self.dtype)
            for i, weights in enumerate(clean):
                own = apart(x) if train and i else x
                rest += project(own, [weights], dtype=self.dtype)
        query, key, value = split_heads(qkv, 3, self.heads)
        source = rest.pop(0) if separate else value.reshape(x.shape)
        return query, key, value, source, rest

    def _sum(  # noqa: PLR0917
        self,
        attention: Array,
        convolution: Array | None,
        source: Array,
        rest: list[Array],
        memory: CrossKV | None,
        train: bool,
    ) -> Array:
        """Sums all branches after their output matrices."""
        check_memory(self.memory_features, memory)
        if convolution is not None:
            attention = jnp.concatenate([attention, convolution], -1)
        xs, weights = [attention], [self.output()]
        if self.ffn != "off":
            y = rest.pop(0) if self.ffn == "own" else source
            y = ACTIVATIONS[self.activation](y)
            xs.append(self.drop_activation(y, deterministic=not train))
            weights.append(self.pointwise())
        if self.memory_features is not None:
            xs.append(self.cross.read(rest.pop(0), memory, train=train))
            weights.append(self.cross.output())
        fused = self.fused and not (train and self.dropout)
        terms = project_to_one(xs, weights, fused=fused, dtype=self.dtype)
        return sum(self.drop(term, deterministic=not train) for term in terms)


if not TYPE_CHECKING:  # names that moved from here
    __getattr__ = renamed.attributes(__name__)
