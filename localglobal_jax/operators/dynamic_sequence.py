# SPDX-License-Identifier: Apache-2.0
"""The operator of DynamicConv (arXiv 1901.10430), the baseline without self-attention."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from localglobal_jax.operators.cache import Cache, Index, valid_at, zero_padding
from localglobal_jax.operators.muse import Kind, SharedValueConv
from localglobal_jax.operators.projection import Projection, project
from localglobal_jax.operators.reach import Reach, local


class DynamicConv(nn.Module):
    """Gated linear unit, then a convolution whose kernel is predicted (arXiv 1901.10430).

    Attributes:
      features: width of input and output. `heads`: channels of a head share a kernel.
      window: of the kernel. `causal`: it ends at the position itself.
      kind: of the convolution, see `SharedValueConv`.
      zero_padding: padding enters the convolution as zeros, see `MuseSequence`.
      dropout: of the kernel's weights.
      dtype: of the computation; parameters are float32.
    """

    features: int
    heads: int
    window: int = 7
    causal: bool = False
    kind: Kind = "dynamic"
    zero_padding: bool = True
    dropout: float = 0.1
    dtype: str = "float32"

    @property
    def reach(self) -> Reach:
        return local(self.window - 1 if self.causal else self.window // 2)

    def setup(self) -> None:
        xavier, d = nn.initializers.xavier_uniform(), self.features
        self.input = Projection(d, (2, d), kernel_init=xavier, name="input")
        self.output = Projection(d, (d,), kernel_init=xavier, name="output")
        self.convolution = SharedValueConv(
            self.heads,
            (self.window,),
            self.kind,
            causal=self.causal,
            dropout=self.dropout,
            dtype=self.dtype,
            name="convolution",
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        y = zero_padding(self._gate(x), mask if self.zero_padding else None)
        y = self.convolution(y, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]

    def init_cache(self, batch: int, length: int) -> Cache:
        """What the window still sees of the past; `length` does not matter."""
        return {"window": jnp.zeros((batch, self.window - 1, self.features), self.dtype)}

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Cache,
        index: Index,
        *,
        valid: Bool[Array, "b m"] | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """The output at the next position."""
        here = valid_at(valid, index) if self.zero_padding and valid is not None else None
        window = jnp.concatenate([cache["window"], zero_padding(self._gate(x), here)], 1)
        y = self.convolution(window, last=True)
        return project(y, [self.output()], dtype=self.dtype)[0], {"window": window[:, 1:]}

    def _gate(self, x: Array) -> Array:
        value, gate = jnp.split(project(x, [self.input()], dtype=self.dtype)[0], 2, -1)
        return value * nn.sigmoid(gate)
