# SPDX-License-Identifier: Apache-2.0
"""Attention: GLOBAL, with weights that depend on the input and, by a bias, on the displacement.

Legend: b batch, l m lengths, h w grid, d width, n heads, c width of a head.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.operators import grids
from localglobal_jax.operators.cache import (
    Cache,
    CrossKV,
    Index,
    append,
    attention_mask,
    attention_mask_at,
    check_causal,
    key_value_cache,
    split_heads,
    to_cache_layout,
)
from localglobal_jax.operators.dense import Dense, DenseGeneral, Projection, head_width, project
from localglobal_jax.operators.kernels import attention as kernels
from localglobal_jax.operators.reach import GLOBAL, Reach
from localglobal_jax.parallel import context, host_memory


def attend(
    query: Float[Array, "*b l n c"],
    key: Float[Array, "*b m n c"],
    value: Float[Array, "*b m n v"],
    *,
    bias: Float[Array, "... n #l m"] | None = None,
    mask: Bool[Array, "... #n #l m"] | None = None,
    kept: Bool[Array, "*b n l m"] | None = None,
    dropout: float = 0.0,
) -> Float[Array, "*b l n v"]:
    """Softmax attention, ``softmax(q.k / sqrt(c) + bias) v`` (arXiv 1706.03762, equation 1).

    The bias is added after the scaling. A key where `mask` is False gets no weight; a query without
    any other key weighs all alike. The softmax is in float32 at least. `kept`: True for the weights
    that a `dropout` of that rate keeps.

    >>> query = jnp.ones((2, 5, 4, 16))  # [b, queries, heads, width of a head]
    >>> key = value = jnp.ones((2, 7, 4, 16))
    >>> lg.operators.attend(query, key, value).shape
    (2, 5, 4, 16)
    """
    keep = 1.0 if kept is None else 1 - dropout
    if context.is_fused() and keep and key.shape[-3]:
        both = jnp.promote_types(query.dtype, key.dtype)  # each gradient has its own dtype again
        query, key = query.astype(both), key.astype(both)
        return kernels.attend(keep, query, key, value, bias, mask, kept)
    weights = attention_weights(query, key, bias=bias, mask=mask)
    if kept is not None:
        weights = jnp.where(kept, weights / keep, 0) if keep else jnp.zeros_like(weights)
    return jnp.einsum("...nlm,...mnv->...lnv", weights.astype(value.dtype), value)


def attention_weights(
    query: Float[Array, "*b l n c"],
    key: Float[Array, "*b m n c"],
    *,
    bias: Float[Array, "... n #l m"] | None = None,
    mask: Bool[Array, "... #n #l m"] | None = None,
) -> Float[Array, "*b n l m"]:
    """Returns the weights of the values in `attend`; rows sum to one, in float32 at least.

    >>> query, key = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 4, 1, 4))
    >>> mask = jnp.array([[[[True, True, False, False]]]])  # for all rows, heads and queries
    >>> lg.operators.attention_weights(query, key, mask=mask)[0, 0].tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("...lnc,...mnc->...nlm", scaled, key, preferred_element_type=wide)
    if bias is not None:
        logits = logits + bias.astype(wide).reshape((1,) * (logits.ndim - bias.ndim) + bias.shape)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    return jax.nn.softmax(logits, axis=-1)


def show(module: nn.Module, query: Array, key: Array, bias: Array | None) -> None:
    """Sows the weights of `module` as "attention" if ``mutable=["intermediates"]`` is given."""
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "attention", attention_weights(query, key, bias=bias))


def relative_positions(height: int, width: int) -> Int[np.ndarray, "l l 2"]:
    """Returns ``(qy - ky, qx - kx)`` for every pair of positions of a grid, query first.

    >>> lg.operators.relative_positions(1, 3)[..., 1].tolist()
    [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    """
    host_memory.check(
        f"the relative positions of attention on a grid of {height}x{width}",
        16 * (height * width) ** 2,
        "Take smaller images, or attention behind more strides.",
    )
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    flat = grid.reshape(-1, 2)
    return flat[:, None] - flat[None, :]


def relative_bias(table: Float[Array, "dy dx n"], height: int, width: int) -> Float[Array, "n l l"]:
    """Looks up ``w_{i-j}`` (CoAtNet, equation 3) for all pairs of a height x width grid.

    >>> table = jnp.arange(5.0).reshape(1, 5, 1)
    >>> lg.operators.relative_bias(table, 1, 3)[0].tolist()
    [[2.0, 1.0, 0.0], [3.0, 2.0, 1.0], [4.0, 3.0, 2.0]]

    Raises ValueError for the table of another grid.
    """
    if table.shape[:2] != (2 * height - 1, 2 * width - 1):
        raise ValueError(
            f"relative_bias: a table {table.shape} is not of a grid of {height} x {width}; it must "
            f"be [{2 * height - 1}, {2 * width - 1}, heads]"
        )
    dy, dx = np.moveaxis(relative_positions(height, width), -1, 0)
    return jnp.moveaxis(table[dy + height - 1, dx + width - 1], -1, 0)


def project_heads(
    x: Float[Array, "b *space d"], heads: int, width: int, use_bias: bool, dtype: str
) -> Float[Array, "3 b *space n c"]:
    """Projects to query, key and value, stacked; makes the caller's submodule "qkv".

    One product for all three. The head axis is explicit so that it can be sharded. Raises
    ValueError if `heads` does not divide `width`.
    """
    qkv = DenseGeneral(
        (3, heads, head_width(width, heads)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name="qkv",
    )(x)
    return jnp.moveaxis(qkv, -3, 0)


def join_heads(
    y: Float[Array, "b *space n c"], features: int, use_bias: bool, dtype: str
) -> Float[Array, "b *space e"]:
    """Joins the heads and projects them; makes the caller's submodule "output"."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name="output",
    )(lax.collapse(y, y.ndim - 2))


class RelativeBiasTable(nn.Module):
    """A free bias per displacement and head: ``table [2h-1, 2w-1, n]``.

    >>> module = lg.operators.RelativeBiasTable(heads=4)
    >>> bias, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), 3, 3))
    >>> bias.shape, variables["params"]["table"].shape
    ((4, 9, 9), (5, 5, 4))
    """

    heads: int

    @nn.compact
    def __call__(self, height: int, width: int) -> Float[Array, "n l l"]:
        shape = (2 * height - 1, 2 * width - 1, self.heads)
        table = self.param("table", nn.initializers.normal(0.02), shape, jnp.float32)
        return relative_bias(table, height, width)


class RelativeBiasMLP(nn.Module):
    """A bias per displacement from a small MLP of its logarithm (log-CPB, arXiv 2111.09883).

    As in timm's ``rmlp`` models: inputs ``sign(d) ln(1 + |d|)`` of (dy, dx), not normalised by
    the window, ReLU, both layers with bias, no squashing of the output. Works at any resolution.

    >>> module = lg.operators.RelativeBiasMLP(heads=4, hidden=8)
    >>> bias, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), 3, 3))
    >>> bias.shape, sorted(variables["params"])
    ((4, 9, 9), ['hidden', 'output'])
    """

    heads: int
    hidden: int = 512
    dropout: float = 0.125

    @nn.compact
    def __call__(self, height: int, width: int, *, train: bool = False) -> Float[Array, "n l l"]:
        dy, dx = np.meshgrid(
            np.arange(1 - height, height), np.arange(1 - width, width), indexing="ij"
        )
        displacement = np.stack([dy, dx], -1).astype(np.float32)
        x = jnp.asarray(np.sign(displacement) * np.log1p(np.abs(displacement)))
        x = nn.relu(Dense(self.hidden, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        table = Dense(self.heads, name="output")(x)
        return relative_bias(table, height, width)


class RelativeAttention(nn.Module):
    """Self-attention over a grid with a bias per displacement (CoAtNet, equation 3, "pre").

    With ``mutable=["intermediates"]`` its weights [b, n, l, l] are sown as "attention".

    Attributes:
      features: output width; None: that of the input.
      heads: number of heads.
      width: inner width, of all heads together; None: `features`.
      bias: "table" (free parameters), "mlp" (log-CPB), or "none" (plain attention).
      bias_hidden, bias_dropout: hidden width and dropout of the "mlp" (timm's: 0.125).
      qkv_bias: of the first projection; the output always has one.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 8, 8, 16))
    >>> module = lg.operators.RelativeAttention(32, heads=4)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, sorted(variables["params"])
    ((2, 8, 8, 32), ['output', 'qkv', 'relative_bias'])
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    bias: Literal["table", "mlp", "none"] = "table"
    bias_hidden: int = 512
    qkv_bias: bool = True
    dtype: str = "float32"
    bias_dropout: float = 0.125

    @property
    def reach(self) -> Reach:
        return GLOBAL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        grids.check_input(self, x, "b h w d")
        _, h, w, d = x.shape
        features = self.features or d
        width, sequence = self.width or features, grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.qkv_bias, self.dtype)
        bias = None
        if self.bias == "table":
            bias = RelativeBiasTable(self.heads, name="relative_bias")(h, w)
        elif self.bias == "mlp":
            mlp = RelativeBiasMLP(
                self.heads, self.bias_hidden, self.bias_dropout, name="relative_bias"
            )
            bias = mlp(h, w, train=train)
        show(self, query, key, bias)
        y = join_heads(attend(query, key, value, bias=bias), features, True, self.dtype)
        return grids.sequence_to_grid(y, (h, w))


FEW = 16  # queries, of all rows together (measured on CPU with 5 and 40)


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
        fused = context.is_fused() and not self.is_mutable_collection("intermediates")
        # For a few queries, as in decoding one sentence, the equation is faster on CPU: 0.89 of the
        # time for the beams of one sentence, 1.12 for those of eight. The reference compares no
        # sizes: an export has symbolic ones.
        if fused and (train or query.shape[0] * query.shape[1] > FEW):
            kept = None
            if train and self.dropout:
                # The mask that `drop(weights)` below would draw.
                shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                kept = drop(jnp.ones(shape, jnp.promote_types(query.dtype, jnp.float32))) != 0
                # Drawn once. Without the barrier XLA draws again in every reader: 0.48 of the
                # cycles of this attention with its backward pass (MUSE on WMT, v5e).
                kept = lax.optimization_barrier(kept)
            dropout = self.dropout if train else 0.0
            y = attend(query, key, value, bias=bias, mask=mask, kept=kept, dropout=dropout)
            return lax.collapse(y, 2)
        weights = attention_weights(query, key, bias=bias, mask=mask)
        self.sow("intermediates", "attention", weights)
        y = jnp.einsum("bnlm,bmnc->blnc", drop(weights).astype(value.dtype), value)
        return lax.collapse(y, 2)


class DistanceBias(nn.Module):
    """A free bias per displacement, clipped at `furthest`, and head: ``table [2 furthest + 1, n]``.

    Displacements are query minus key, as in `RelativeBiasTable`; sequences have no largest size.
    Displacements may differ between the rows b.

    >>> module = lg.operators.DistanceBias(heads=4, furthest=2)
    >>> displacement = jnp.arange(6)[:, None] - jnp.arange(6)[None, :]
    >>> jax.eval_shape(module.init_with_output, jax.random.key(0), displacement)[0].shape
    (4, 6, 6)
    """

    heads: int
    furthest: int = 128

    @nn.compact
    def __call__(self, displacement: Int[Array, "*b l m"]) -> Float[Array, "*b n l m"]:
        shape = (2 * self.furthest + 1, self.heads)
        table = self.param("table", nn.initializers.normal(0.02), shape, jnp.float32)
        displacement = jnp.clip(displacement, -self.furthest, self.furthest)
        return jnp.moveaxis(table[displacement + self.furthest], -1, -3)


class SelfAttention(nn.Module):
    """Self-attention over a sequence; `furthest` adds CoAtNet's bias (equation 3) in 1-D.

    Attributes:
      features: width of input and output. `heads`: their number.
      causal: no position sees a later one.
      furthest: a bias per displacement up to this one; None: no bias.
      dropout: of the attention weights.
      dtype: of the computation; parameters are float32.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.operators.SelfAttention(16, heads=2, causal=True)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape, module.reach.name
    ((2, 6, 16), 'GLOBAL')
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
        grids.check_input(self, x, "b l d")
        query, key, value = self._project(x)
        bias = None
        if self.furthest is not None:
            bias = self.bias(self.displacements(x.shape[1], mask))
        mask = attention_mask(mask, x.shape[1], causal=self.causal)
        y = self.attend(query, key, value, bias=bias, mask=mask, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache of keys and values for `length` positions."""
        check_causal(self)
        return key_value_cache(batch, length, self.features, self.heads, self.dtype)

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """Returns the output at position `index`; `valid` is False at padding up to there."""
        check_causal(self)
        query, key, value = self._project(x)
        cache = {
            "key": append(cache["key"], key, index),
            "value": append(cache["value"], value, index),
        }
        length = cache["key"].shape[2]
        bias = None
        if self.furthest is not None:
            bias = self.bias((index - jnp.arange(length))[None])
        mask = attention_mask_at(index, valid, length)
        y = self.attend(
            query,
            to_cache_layout(cache["key"]),
            to_cache_layout(cache["value"]),
            bias=bias,
            mask=mask,
        )
        return project(y, [self.output()], dtype=self.dtype)[0], cache

    def displacements(self, length: int, mask: Bool[Array, "b l"] | None) -> Int[Array, "*b l l"]:
        """Returns query minus key for all pairs of positions."""
        position = jnp.arange(length)
        return position[:, None] - position[None, :]

    def _project(self, x: Array) -> tuple[Array, ...]:
        (qkv,) = project(x, [self.qkv()], dtype=self.dtype)
        return split_heads(qkv, 3, self.heads)


class CrossAttention(nn.Module):
    """Attention to another sequence, whose keys and values `precompute_kv` computes once.

    Attributes:
      features: width of input and output. `heads`: their number.
      memory_features: width of the other sequence.
      input_init, output_init: of the matrices.
      dropout: of the attention weights.
      dtype: of the computation; parameters are float32.

    >>> module = lg.operators.CrossAttention(16, heads=2, memory_features=8)
    >>> def read(x, encoded):
    ...     return module.init_with_output(jax.random.key(0), x, encoded, method=both)
    >>> def both(module, x, encoded):
    ...     mask = jnp.ones(encoded.shape[:2], bool)  # True: a token, False: padding
    ...     return module(x, module.precompute_kv(encoded, mask))
    >>> jax.eval_shape(read, jnp.ones((2, 6, 16)), jnp.ones((2, 9, 8)))[0].shape
    (2, 6, 16)
    """

    features: int
    heads: int
    memory_features: int
    dropout: float = 0.0
    input_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    output_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: str = "float32"

    def setup(self) -> None:
        width = head_width(self.features, self.heads)
        init = self.input_init
        self.query = Projection(self.features, (self.heads, width), kernel_init=init, name="query")
        self.key_value = Projection(
            self.memory_features, (2, self.heads, width), kernel_init=init, name="key_value"
        )
        self.output = Projection(
            self.features, (self.features,), kernel_init=self.output_init, name="output"
        )
        self.attend = Attend(self.dropout, name="attend")

    def precompute_kv(self, encoded: Float[Array, "b m e"], mask: Bool[Array, "b m"]) -> CrossKV:
        """Returns keys and values of the other sequence, and its padding mask."""
        (key_value,) = project(encoded, [self.key_value()], dtype=self.dtype)
        key, value = split_heads(key_value, 2, self.heads)
        return {"key": to_cache_layout(key), "value": to_cache_layout(value), "mask": mask}

    def read(
        self, query: Float[Array, "rows l d"], memory: CrossKV | None, *, train: bool = False
    ) -> Float[Array, "rows l d"]:
        """Attends from projected queries to the memory; the output matrix is not applied.

        Several rows may share one row of the memory, e.g. the beams of a sentence: they become
        positions of one query, so that the memory is neither repeated nor read more than once.
        """
        if memory is None:
            raise ValueError("a layer with memory_features needs a memory: see `precompute_kv`")
        rows, shape = memory["key"].shape[0], query.shape
        length = shape[1] if rows == shape[0] else shape[0] // rows * shape[1]
        query = query.reshape(rows, length, self.heads, shape[2] // self.heads)
        mask = memory["mask"][:, None, None, :]
        key, value = to_cache_layout(memory["key"]), to_cache_layout(memory["value"])
        y = self.attend(query, key, value, mask=mask, train=train)
        return y.reshape(shape)

    def __call__(
        self, x: Float[Array, "rows l d"], memory: CrossKV | None, *, train: bool = False
    ) -> Float[Array, "rows l d"]:
        (query,) = project(x, [self.query()], dtype=self.dtype)
        y = self.read(query, memory, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]
