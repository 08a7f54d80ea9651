# SPDX-License-Identifier: Apache-2.0
"""The halves of a sequence model: a stack of layers, all positions at once or one by one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from localglobal_jax.blocks.sequence import SEQUENCE_BLOCKS
from localglobal_jax.blocks.stack import in_sequence
from localglobal_jax.operators.cache import Cache, Memory

PER_LAYER = {"windows": 2, "window": 1}  # options that may be one per layer: nested this deep


def sinusoids(positions: Int[Array, "b l"], width: int) -> Float[Array, "b l d"]:
    """``[sin(p f_i) | cos(p f_i)]``, f_i = 10000^(-i / (width/2 - 1)); an odd width ends in zero.

    Sines first, then cosines, as fairseq has them; arXiv 1706.03762, section 3.5, interleaves.
    """
    half = width // 2
    frequency = jnp.exp(jnp.arange(half) * (-math.log(10000) / max(half - 1, 1)))
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    return jnp.pad(waves, ((0, 0), (0, 0), (0, width % 2)))


def layer_options(options: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The options of one layer: those that are given per layer, at `layer`."""

    def depth(value: Any) -> int:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return 0
        return 1 + depth(value[0]) if value else 1

    chosen = dict(options)
    for name, nested in PER_LAYER.items():
        if name in chosen and depth(chosen[name]) == nested:
            if layer >= len(chosen[name]):
                raise ValueError(
                    f"{name}={chosen[name]} is given for {len(chosen[name])} layers, "
                    f"but there is a layer {layer + 1}"
                )
            chosen[name] = chosen[name][layer]
    return chosen


class Stack(nn.Module):
    """Layers one after the other, and a last norm if the layers norm their input.

    Attributes:
      letters: one layer each, see `SEQUENCE_BLOCKS`.
      options: letter -> options of that layer; some may be one per layer.
      shared: options of all layers, whatever their letter.
    """

    letters: str
    options: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any]

    def setup(self) -> None:
        self.layers = [
            SEQUENCE_BLOCKS[letter](
                **self.shared,
                **layer_options(self.options.get(letter, {}), i),
                name=f"layer{i + 1}",
            )
            for i, letter in enumerate(self.letters)
        ]
        if self.shared["pre_norm"]:
            self.norm = nn.LayerNorm(epsilon=1e-5, dtype=self.shared["dtype"], name="norm")

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None,
        memory: Mapping[str, Memory] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l d"], dict[str, Float[Array, "b l d"]]]:
        """The output, and that of every layer."""

        def call(layer: nn.Module, x: Array, own: tuple[Any, Any]) -> Array:
            mask, memory = own
            return layer(x, mask=mask, memory=memory, train=train)

        names, layers = zip(*self._named(), strict=True)
        given = [(mask, None if memory is None else memory[name]) for name in names]
        outputs = in_sequence(self, layers, x, call, given)
        return self._last(outputs[-1]), dict(zip(names, outputs, strict=True))

    def remember(
        self, encoded: Float[Array, "b m e"], mask: Bool[Array, "b m"]
    ) -> dict[str, Memory]:
        """What every layer keeps of the encoder's output."""
        return {name: layer.remember(encoded, mask) for name, layer in self._named()}

    def init_cache(self, batch: int, length: int) -> dict[str, Cache]:
        """Empty caches for `length` positions."""
        return {name: layer.init_cache(batch, length) for name, layer in self._named()}

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Mapping[str, Cache],
        index: Int[Array, ""],
        *,
        valid: Bool[Array, "b m"] | None,
        memory: Mapping[str, Memory],
    ) -> tuple[Float[Array, "b 1 d"], dict[str, Cache]]:
        """One position through all layers."""
        new = {}
        for name, layer in self._named():
            x, new[name] = layer.step(x, cache[name], index, valid=valid, memory=memory[name])
        return self._last(x), new

    def _named(self) -> list[tuple[str, Any]]:
        return [(f"layer{i + 1}", layer) for i, layer in enumerate(self.layers)]

    def _last(self, x: Array) -> Array:
        return self.norm(x) if self.shared["pre_norm"] else x
