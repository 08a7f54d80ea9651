# SPDX-License-Identifier: Apache-2.0
"""Self-attention: GLOBAL, weights made from the content; with a bias, it knows the displacement.

Legend: b batch, l m lengths, h w grid, d width, n heads, c width of a head.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.operators import grids
from localglobal_jax.operators.dense import Dense, DenseGeneral
from localglobal_jax.operators.reach import GLOBAL, Reach
from localglobal_jax.parallel import context, host_memory, placement

# ---------------------------------------------------------------------------- functions


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

    The bias is added after the scaling. Where `mask` is False a key gets no weight. The softmax is
    in float32 at least. `kept`: the weights that a `dropout` of that rate left.
    """
    if context.formulation() == "tuned":
        return _attend(1 - dropout, query, key, value, bias, mask, kept)
    weights = attention_weights(query, key, bias=bias, mask=mask)
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    return jnp.einsum("...nlm,...mnv->...lnv", weights.astype(value.dtype), value)


def attention_weights(
    query: Float[Array, "*b l n c"],
    key: Float[Array, "*b m n c"],
    *,
    bias: Float[Array, "... n #l m"] | None = None,
    mask: Bool[Array, "... #n #l m"] | None = None,
) -> Float[Array, "*b n l m"]:
    """The weights that `attend` gives to the values; each row sums to one, in float32 at least."""
    return jax.nn.softmax(_logits("...lnc,...mnc->...nlm", query, key, bias, mask), axis=-1)


def show(module: nn.Module, query: Array, key: Array, bias: Array | None) -> None:
    """Sows the weights of `module`, if somebody looks (``mutable=["intermediates"]``)."""
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "attention", attention_weights(query, key, bias=bias))


def _by_heads(*arrays: Array) -> list[Array]:
    """[..., l, n, c] -> [..., n, l, c], and back."""
    return [jnp.swapaxes(x, -3, -2) for x in arrays]


def _logits(
    product: str, query: Array, key: Array, bias: Array | None, mask: Array | None
) -> Array:
    logits = jnp.einsum(
        product,
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(keep: float, *inputs: Any) -> Array:
    """`attend`, writing one array [b, n, l, m] in each direction, in the dtype of the values.

    Forward, that is the numerator of the softmax, which the backward pass reads again. Backward, it
    is the gradient of the logits: what the softmax subtracts from it, ``sum_m g_lm w_lm``, is
    ``g_l . y_l`` (arXiv 2205.14135, B.4). Products have the heads in front, ``[b, n, l, c]``: XLA
    on CPU took 2.5 times as long for the others.
    Of CoAtNet's 196 positions, 0.52 of the cycles and 0.36 of the bytes (v5e).
    """
    return _attend_forward(keep, *inputs)[0]


def _attend_forward(keep: float, *inputs: Any) -> tuple[Array, Any]:
    query, key, value, bias, mask, kept = inputs
    query, key, value = _by_heads(query, key, value)
    numerator, total = placement.by_platform(
        query, key, bias, mask, tpu=partial(_numerator, twice=True), default=_numerator
    )
    numerator = numerator.astype(value.dtype)
    left = _where(kept, numerator)
    y = jnp.einsum("...nlm,...nmv->...nlv", left, value, preferred_element_type=total.dtype)
    (y,) = _by_heads((y / (total * keep)).astype(value.dtype))
    return y, (*inputs, numerator, total, y)


def _numerator(
    query: Array, key: Array, bias: Array | None, mask: Array | None, *, twice: bool = False
) -> tuple[Array, Array]:
    """``(exp(logits - their maximum), its sum [..., n, l, 1])``.

    `twice`: the logits are made anew from a barrier on, else float32 ones are stored and read three
    times. That is cheaper on TPU, which joins ``exp`` to the product; not on CPU (1.25 times the
    time), nor where products are a library's calls, as on GPU.
    """
    by_heads = "...nlc,...nmc->...nlm"
    logits = _logits(by_heads, query, key, bias, mask)
    highest = logits.max(-1, keepdims=True, initial=-jnp.inf)
    if twice:
        *again, highest = jax.lax.optimization_barrier((query, key, bias, mask, highest))
        logits = _logits(by_heads, *again)
    numerator = jnp.exp(logits - highest)
    return numerator, numerator.sum(-1, keepdims=True)


def _attend_backward(keep: float, saved: Any, g: Array) -> tuple[Array | None, ...]:
    query, key, value, bias, mask, kept, numerator, total, y = saved
    wide, scale = total.dtype, query.shape[-1] ** -0.5
    subtracted = jnp.sum(g.astype(wide) * y.astype(wide), -1)[..., None].swapaxes(-3, -2)
    share = (g / (total * keep).swapaxes(-3, -2)).astype(g.dtype)
    key, value, gradient = _by_heads(key, value, g)
    d_weights = jnp.einsum("...nlv,...nmv->...nlm", gradient, value, preferred_element_type=wide)
    d_weights = _where(kept, d_weights / keep)
    d_logits = (numerator * ((d_weights - subtracted) / total)).astype(query.dtype)
    d_logits = _where(mask, d_logits)
    # over queries, XLA on CPU is quicker (by a third) with the heads where they were
    d_value = jnp.einsum("...nlm,...lnv->...mnv", _where(kept, numerator), share)
    d_key = jnp.einsum("...nlm,...lnc->...mnc", d_logits, query) * scale
    (d_query,) = _by_heads(jnp.einsum("...nlm,...nmc->...nlc", d_logits, key) * scale)
    d_bias = None
    if bias is not None:
        whole = partial(jnp.broadcast_to, shape=d_logits.shape)
        (d_bias,) = jax.vjp(whole, bias.astype(wide))[1](d_logits.astype(wide))
        d_bias = d_bias.astype(bias.dtype)
    return d_query, d_key, d_value, d_bias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


def relative_positions(height: int, width: int) -> Int[np.ndarray, "l l 2"]:
    """``(qy - ky, qx - kx)`` for every pair of positions of a grid, query first."""
    host_memory.check(
        f"the relative positions of attention on a grid of {height}x{width}",
        16 * (height * width) ** 2,
        "Take smaller images, or attention behind more strides.",
    )
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    flat = grid.reshape(-1, 2)
    return flat[:, None] - flat[None, :]


def relative_bias(table: Float[Array, "dy dx n"], height: int, width: int) -> Float[Array, "n l l"]:
    """Looks up ``w_{i-j}`` (CoAtNet, equation 3) for all pairs of a height x width grid."""
    dy, dx = np.moveaxis(relative_positions(height, width), -1, 0)
    return jnp.moveaxis(table[dy + height - 1, dx + width - 1], -1, 0)


# ---------------------------------------------------------------------------- modules


def project_heads(
    x: Float[Array, "b *space d"], heads: int, width: int, use_bias: bool, dtype: str
) -> Float[Array, "3 b *space n c"]:
    """Query, key and value, stacked; makes the submodule "qkv" of the module that calls it.

    One product for all three; the head axis is explicit so that it can be sharded. Raises
    ValueError where the heads do not divide the width.
    """
    if width % heads:
        raise ValueError(f"attention: width {width} is not divisible by {heads} heads")
    qkv = DenseGeneral(
        (3, heads, width // heads),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name="qkv",
    )(x)
    return jnp.moveaxis(qkv, -3, 0)


def join_heads(
    y: Float[Array, "b *space n c"], features: int, use_bias: bool, dtype: str
) -> Float[Array, "b *space e"]:
    """Joins the heads and projects them; makes the submodule "output"."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name="output",
    )(y.reshape(*y.shape[:-2], -1))


class RelativeBiasTable(nn.Module):
    """A free bias per displacement and head: ``table [2h-1, 2w-1, n]``."""

    heads: int

    @nn.compact
    def __call__(self, height: int, width: int) -> Float[Array, "n l l"]:
        shape = (2 * height - 1, 2 * width - 1, self.heads)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        return relative_bias(table, height, width)


class RelativeBiasMLP(nn.Module):
    """A bias per displacement made by a small MLP of its logarithm (log-CPB, arXiv 2111.09883).

    As timm's ``rmlp`` models have it: inputs ``sign(d) ln(1 + |d|)`` of (dy, dx), not normalised by
    the window, ReLU, both layers with bias, no squashing of the output. Works at any resolution.
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
      bias_hidden: hidden width of the "mlp".
      qkv_bias: of the first projection; the output always has one.
      dtype: of the computation; parameters are float32.
    """

    features: int | None = None
    heads: int = 8
    width: int | None = None
    bias: Literal["table", "mlp", "none"] = "table"
    bias_hidden: int = 512
    qkv_bias: bool = True
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return GLOBAL

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h w e"]:
        _, h, w, d = x.shape
        features = self.features or d
        width, sequence = self.width or features, grids.grid_to_sequence(x)
        query, key, value = project_heads(sequence, self.heads, width, self.qkv_bias, self.dtype)
        bias = None
        if self.bias == "table":
            bias = RelativeBiasTable(self.heads, name="relative_bias")(h, w)
        elif self.bias == "mlp":
            bias = RelativeBiasMLP(self.heads, self.bias_hidden, name="relative_bias")(
                h, w, train=train
            )
        show(self, query, key, bias)
        y = join_heads(attend(query, key, value, bias=bias), features, True, self.dtype)
        return grids.sequence_to_grid(y, (h, w))
