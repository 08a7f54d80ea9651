# SPDX-License-Identifier: Apache-2.0
"""Classifier heads: pooling, and class attention (arXiv 2103.17239)."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from localglobal_jax.blocks.layers import MLP, Norm, make_norm
from localglobal_jax.blocks.stack import apply_blocks
from localglobal_jax.operators import grids
from localglobal_jax.operators.attention import attend
from localglobal_jax.operators.dense import Dense, DenseGeneral


class PoolingHead(nn.Module):
    """Average over the grid and a linear classifier.

    Attributes:
      classes: number of logits; 0: no classifier, the pooled features are returned.
      norm: "layer" or "batch"; `norm_first`: before the pooling (over the map) or after it.
      hidden: width of a tanh layer before the classifier (after the norm); 0: none.
    """

    classes: int
    norm: Norm = "layer"
    norm_first: bool = False
    norm_eps: float = 1e-6
    hidden: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> tuple[Float[Array, "b k"], Float[Array, "b e"]]:
        """Returns the logits and the features they are made from."""
        norm = make_norm(self.norm, eps=self.norm_eps, train=train, dtype=self.dtype, name="norm")
        x = norm(x).mean((1, 2)) if self.norm_first else norm(x.mean((1, 2)))
        if self.hidden:
            x = nn.tanh(Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        if not self.classes:
            return x, x
        return Dense(self.classes, dtype=self.dtype, name="classifier")(x), x


class ClassAttentionHead(nn.Module):
    """Class blocks, a norm over all tokens, a classifier; with `aux`, another for every token.

    Attributes:
      classes: number of logits; 0: no classifiers, the class features are returned.
      blocks: number of class blocks; 0: no class token, the classifier reads the tokens' average.
      heads, expansion, qkv_bias: of the class blocks.
      aux: a second classifier on every token, for token labelling (arXiv 2104.10858).
    """

    classes: int
    blocks: int = 2
    heads: int = 12
    expansion: float = 3.0
    qkv_bias: bool = False
    aux: bool = True
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, train: bool = False
    ) -> tuple[Float[Array, "b k"], Float[Array, "b h w k"] | None, Float[Array, "b d"]]:
        """Returns the class logits, the logits of every token (None without `aux`), features."""
        b, h, w, d = x.shape
        x = grids.grid_to_sequence(x)
        if self.blocks:
            token = self.param("class_token", nn.initializers.normal(0.02), (d,), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype), (b, 1, d))
            blocks = [
                ClassBlock(
                    self.heads,
                    self.expansion,
                    self.qkv_bias,
                    self.norm_eps,
                    self.dtype,
                    name=f"block{i + 1}",
                )
                for i in range(self.blocks)
            ]

            def call(block: nn.Module, token: Array, extra: None) -> Array:
                del extra
                return block(token, x, train=train)

            token = apply_blocks(self, blocks, token, call, [None] * self.blocks)[-1]
            x = jnp.concatenate([token, x], axis=1)
        # The logits are float32 at least, for any dtype of the blocks.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = nn.LayerNorm(epsilon=self.norm_eps, name="norm")(x)
        features = x[:, 0] if self.blocks else x.mean(1)
        if not self.classes:
            return features, None, features
        dense = partial(Dense, self.classes, kernel_init=nn.initializers.normal(0.02))
        logits = dense(name="classifier")(features)
        if not self.aux:
            return logits, None, features
        tokens = grids.sequence_to_grid(x[:, 1:] if self.blocks else x, (h, w))
        return logits, dense(name="aux_classifier")(tokens), features


class ClassBlock(nn.Module):
    """Class attention and an MLP, each with its norm and residual, on the class token only."""

    heads: int
    expansion: float = 3.0
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, token: Float[Array, "b 1 d"], rest: Float[Array, "b l d"], *, train: bool = False
    ) -> Float[Array, "b 1 d"]:
        norm = partial(make_norm, "layer", eps=self.norm_eps, train=train, dtype=self.dtype)
        x = norm(name="norm")(jnp.concatenate([token, rest], axis=1))
        y = ClassAttention(self.heads, self.qkv_bias, self.dtype, name="attention")(x)
        token = token + y
        hidden = int(self.expansion * token.shape[-1])
        y = MLP(hidden, dtype=self.dtype, name="mlp")(norm(name="mlp_norm")(token))
        return token + y


class ClassAttention(nn.Module):
    """The first token of a sequence, the class token, attends to all, itself included.

    CaiT (arXiv 2103.17239, section 2.2), in the form of VOLO's code.
    """

    heads: int
    qkv_bias: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b 1 d"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"class attention: width {width} is not divisible by {self.heads} heads"
            )
        dense = partial(DenseGeneral, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        part = width // self.heads
        query = dense((self.heads, part), use_bias=self.qkv_bias, name="query")(x[:, :1])
        pair = dense((2, self.heads, part), use_bias=self.qkv_bias, name="key_value")(x)
        y = attend(query, pair[..., 0, :, :], pair[..., 1, :, :])
        return dense(width, name="output")(y.reshape(x.shape[0], 1, width))
