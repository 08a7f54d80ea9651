# SPDX-License-Identifier: Apache-2.0
"""Layers of encoders and decoders. Each has one letter, like the blocks over grids.

Every layer has the fields `features`, `heads`, `hidden`, `causal`, `memory_features` (width of the
encoder's output for cross-attention; None: no cross-attention), `pre_norm`, `zero_padding`,
dropouts and `dtype`, and is called as the operators of `operators.cache` are, with ``memory=``
beside ``mask=``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float
from pydantic import PositiveInt

from localglobal_jax.config.schema import Fraction
from localglobal_jax.operators import grids
from localglobal_jax.operators.activations import ACTIVATIONS, Activation
from localglobal_jax.operators.adaptive import AdaptiveConv, EquivariantSequence
from localglobal_jax.operators.attention import CrossAttention, SelfAttention
from localglobal_jax.operators.cache import Cache, CrossKV, Index, check_memory
from localglobal_jax.operators.convolution import DynamicConv, Kind
from localglobal_jax.operators.dense import Projection, project
from localglobal_jax.operators.muse import MuseSequence, Pointwise, Source

Sequence = Float[Array, "b l d"]
Mask = Bool[Array, "b l"]


class MuseLayer(nn.Module):
    """M: ``Norm(x + Muse(x))``, or ``x + Muse(Norm(x))`` with `pre_norm`: one norm, one residual.

    Attributes other than those of every layer are those of `MuseSequence`.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.MuseLayer(16, heads=2, hidden=32, windows=(3,))
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    features: int
    heads: int
    hidden: int
    causal: bool = False
    memory_features: int | None = None
    pre_norm: bool = False
    zero_padding: bool = True
    windows: tuple[PositiveInt, ...] = (3, 15)
    kind: Kind = "dynamic"
    gate: bool = True
    projection: Source = "shared"
    ffn: Pointwise = "own"
    activation: Activation = "relu"
    fused: bool = False
    dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    activation_dropout: Fraction = 0.0
    kernel_dropout: Fraction = 0.1
    input_dropout: Fraction = 0.0
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def setup(self) -> None:
        block_fields = ("parent", "name", "pre_norm", "norm_eps")
        fields = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in block_fields}
        self.muse = MuseSequence(**fields, name="muse")
        self.norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")

    def __call__(
        self,
        x: Sequence,
        *,
        mask: Mask | None = None,
        memory: CrossKV | None = None,
        train: bool = False,
    ) -> Sequence:
        grids.check_input(self, x, "b l d")
        y = self.norm(x) if self.pre_norm else x
        y = x + self.muse(y, mask=mask, memory=memory, train=train)
        return y if self.pre_norm else self.norm(y)

    def precompute_kv(self, encoded: Sequence, mask: Mask) -> CrossKV:
        """Returns the keys and values of the encoder's output for the cross-attention."""
        return self.muse.precompute_kv(encoded, mask)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions."""
        return self.muse.init_cache(batch, length)

    def step(
        self,
        x: Sequence,
        cache: Cache,
        index: Index,
        *,
        valid: Mask | None = None,
        memory: CrossKV | None = None,
    ) -> tuple[Sequence, Cache]:
        """Returns the output at position `index`, and the new cache."""
        y = self.norm(x) if self.pre_norm else x
        y, cache = self.muse.step(y, cache, index, valid=valid, memory=memory)
        return (x + y if self.pre_norm else self.norm(x + y)), cache


class TransformerLayer(nn.Module):
    """S: self-attention, cross-attention and a pointwise net one after the other (1706.03762).

    Each has its own norm and residual. The other layers in sequence differ in the first operator,
    which `mixer` makes: any operator with the interface of `operators.cache`.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.TransformerLayer(16, heads=2, hidden=32)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    features: int
    heads: int
    hidden: int
    causal: bool = False
    memory_features: int | None = None
    pre_norm: bool = False
    zero_padding: bool = True
    activation: Activation = "relu"
    dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    activation_dropout: Fraction = 0.0
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.nowrap
    def mixer(self) -> nn.Module:
        """Returns the operator that reads other positions."""
        return SelfAttention(**self.shared_fields())

    @nn.nowrap
    def shared_fields(self) -> dict[str, Any]:
        """Returns the fields of every attention."""
        return {
            "features": self.features,
            "heads": self.heads,
            "causal": self.causal,
            "dropout": self.attention_dropout,
            "dtype": self.dtype,
            "name": "attention",
        }

    def setup(self) -> None:
        xavier, d = nn.initializers.xavier_uniform(), self.features
        self.mix = self.mixer()
        self.norm = self._norm("norm")
        if self.memory_features is not None:
            self.cross = CrossAttention(
                d,
                self.heads,
                self.memory_features,
                self.attention_dropout,
                dtype=self.dtype,
                name="cross",
            )
            self.cross_norm = self._norm("cross_norm")
        self.hidden_layer = Projection(d, (self.hidden,), kernel_init=xavier, name="hidden")
        self.pointwise = Projection(self.hidden, (d,), kernel_init=xavier, name="pointwise")
        self.mlp_norm = self._norm("mlp_norm")
        self.drop = nn.Dropout(self.dropout)
        self.drop_activation = nn.Dropout(self.activation_dropout)

    def __call__(
        self,
        x: Sequence,
        *,
        mask: Mask | None = None,
        memory: CrossKV | None = None,
        train: bool = False,
    ) -> Sequence:
        grids.check_input(self, x, "b l d")
        x = self._residual(x, self.norm, lambda y: self.mix(y, mask=mask, train=train), train)
        return self._rest(x, memory, train)

    def precompute_kv(self, encoded: Sequence, mask: Mask) -> CrossKV:
        """Returns the keys and values of the encoder's output for the cross-attention."""
        check_memory(self.memory_features, encoded)
        return self.cross.precompute_kv(encoded, mask)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache for `length` positions."""
        return self.mix.init_cache(batch, length)

    def step(
        self,
        x: Sequence,
        cache: Cache,
        index: Index,
        *,
        valid: Mask | None = None,
        memory: CrossKV | None = None,
    ) -> tuple[Sequence, Cache]:
        """Returns the output at position `index`, and the new cache."""
        y = self.norm(x) if self.pre_norm else x
        y, cache = self.mix.step(y, cache, index, valid=valid)
        x = x + y if self.pre_norm else self.norm(x + y)
        return self._rest(x, memory, False), cache

    def _rest(self, x: Sequence, memory: CrossKV | None, train: bool) -> Sequence:
        check_memory(self.memory_features, memory)
        if self.memory_features is not None:
            x = self._residual(
                x, self.cross_norm, lambda y: self.cross(y, memory, train=train), train
            )
        return self._residual(x, self.mlp_norm, lambda y: self._mlp(y, train), train)

    def _mlp(self, x: Sequence, train: bool) -> Sequence:
        (y,) = project(x, [self.hidden_layer()], dtype=self.dtype)
        y = self.drop_activation(ACTIVATIONS[self.activation](y), deterministic=not train)
        return project(y, [self.pointwise()], dtype=self.dtype)[0]

    def _residual(
        self, x: Sequence, norm: nn.Module, branch: Callable[[Sequence], Sequence], train: bool
    ) -> Sequence:
        y = self.drop(branch(norm(x) if self.pre_norm else x), deterministic=not train)
        return x + y if self.pre_norm else norm(x + y)

    @nn.nowrap
    def _norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)


class RelativeLayer(TransformerLayer):
    """T: with a bias per displacement and head, up to `furthest` positions apart.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.RelativeLayer(16, heads=2, hidden=32, furthest=4)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    furthest: PositiveInt = 128

    @nn.nowrap
    def mixer(self) -> nn.Module:
        return SelfAttention(furthest=self.furthest, **self.shared_fields())


class AdaptiveLayer(TransformerLayer):
    """A: content-adaptive convolution in place of self-attention: a `window` of positions.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.AdaptiveLayer(16, heads=2, hidden=32, window=3)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    window: PositiveInt = 7

    @nn.nowrap
    def mixer(self) -> nn.Module:
        return AdaptiveConv(window=self.window, **self.shared_fields())


class EquivariantLayer(RelativeLayer):
    """E: translation-equivariant attention; the tokens of an encoder's sentence form a ring.

    Position embeddings would mark the start of the ring: use ``positions="none"``.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.EquivariantLayer(16, heads=2, hidden=32, furthest=4)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    @nn.nowrap
    def mixer(self) -> nn.Module:
        return EquivariantSequence(furthest=self.furthest, **self.shared_fields())


class DynamicConvLayer(TransformerLayer):
    """D: DynamicConv (arXiv 1901.10430) in place of self-attention.

    >>> x = jnp.ones((2, 6, 16))
    >>> module = lg.blocks.DynamicConvLayer(16, heads=2, hidden=32, window=3, causal=True)
    >>> y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 6, 16)
    """

    window: PositiveInt = 7
    kind: Kind = "dynamic"
    kernel_dropout: Fraction = 0.1

    @nn.nowrap
    def mixer(self) -> nn.Module:
        return DynamicConv(
            self.features,
            self.heads,
            self.window,
            self.causal,
            self.kind,
            self.zero_padding,
            self.kernel_dropout,
            self.dtype,
            name="convolution",
        )


SEQUENCE_BLOCKS: dict[str, type[nn.Module]] = {
    "A": AdaptiveLayer,
    "D": DynamicConvLayer,
    "E": EquivariantLayer,
    "M": MuseLayer,
    "S": TransformerLayer,
    "T": RelativeLayer,
}
