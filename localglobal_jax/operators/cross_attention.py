# SPDX-License-Identifier: Apache-2.0
"""Attention from one sequence to another: GLOBAL. Legend: see `sequence`."""

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from localglobal_jax.operators.cache import Attend, Memory, head_width, slots, split_heads
from localglobal_jax.operators.projection import Projection, project


class CrossAttention(nn.Module):
    """Attention to another sequence, whose keys and values are made once, by `remember`.

    Attributes:
      features: width of input and output. `heads`: their number.
      memory_features: width of the other sequence.
      input_init, output_init: of the matrices.
      dropout: of the attention weights.
      dtype: of the computation; parameters are float32.
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

    def remember(self, encoded: Float[Array, "b m e"], mask: Bool[Array, "b m"]) -> Memory:
        """Keys and values of the other sequence, and where it is real."""
        (key_value,) = project(encoded, [self.key_value()], dtype=self.dtype)
        key, value = split_heads(key_value, 2, self.heads)
        return {"key": slots(key), "value": slots(value), "mask": mask}

    def read(
        self, query: Float[Array, "rows l d"], memory: Memory | None, *, train: bool = False
    ) -> Float[Array, "rows l d"]:
        """What projected queries find in the memory, before the output matrix.

        Several rows may share one row of the memory, e.g. the beams of a sentence: they become
        positions of one query, so that the memory is neither repeated nor read more than once.
        """
        if memory is None:
            raise ValueError("a layer with memory_features needs a memory: see `remember`")
        rows, shape = memory["key"].shape[0], query.shape
        query = query.reshape(rows, -1, self.heads, shape[-1] // self.heads)
        mask = memory["mask"][:, None, None, :]
        key, value = slots(memory["key"]), slots(memory["value"])
        y = self.attend(query, key, value, mask=mask, train=train)
        return y.reshape(shape)

    def __call__(
        self, x: Float[Array, "rows l d"], memory: Memory | None, *, train: bool = False
    ) -> Float[Array, "rows l d"]:
        (query,) = project(x, [self.query()], dtype=self.dtype)
        y = self.read(query, memory, train=train)
        return project(y, [self.output()], dtype=self.dtype)[0]
