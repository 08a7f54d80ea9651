# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders: MUSE (arXiv 1911.09483), and the Transformer and DynamicConv beside it.

Two stages of layers, each layer a letter: ``"MM"`` is MUSE, ``"SS"`` the Transformer, ``"TT"`` the
one with relative attention, ``"DD"`` DynamicConv, ``"AA"`` content-adaptive convolution, ``"EE"``
translation-equivariant attention, ``("MS", "S")`` alternates in the encoder. One stage alone is an
encoder. Sizes follow the paper; where paper and public code leave a choice, the defaults are those
of the public code, but for padding, which never changes a result here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int
from pydantic import PositiveInt

from localglobal_jax.blocks.sequence import SEQUENCE_BLOCKS
from localglobal_jax.blocks.stack import apply_blocks
from localglobal_jax.config.schema import Fraction
from localglobal_jax.models import layout as layouts
from localglobal_jax.operators.activations import Activation
from localglobal_jax.operators.cache import Cache, CrossKV
from localglobal_jax.operators.dense import wide_product
from localglobal_jax.operators.grids import check_input

MATRIX = re.compile(r"kernel\d*|embedding")  # names of matrices in the parameters
_IWSLT = {"source_vocab": 8848, "target_vocab": 6632, "embeddings": "separate"}
_EN_DE = {"source_vocab": 32768, "target_vocab": 32768}
_EN_FR = {"source_vocab": 44512, "target_vocab": 44512}


def _both(layout: str, depth: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    pairs = {"depths": depth, "widths": width, "heads": heads, "hidden": hidden}
    return {"layout": layout * 2, **{name: (n, n) for name, n in pairs.items()}}


_SIMPLE = {"blocks": {"M": {"windows": ()}}}
_NOISY = {"blocks": {"M": {"input_dropout": 0.1}}, "attention_dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {  # the paper's table 1 and 2, with the recipes' dropouts
    "muse_iwslt": {**_both("M", 12, 384, 4, 768), **_IWSLT, "dropout": 0.4},
    "muse_simple_iwslt": {**_both("M", 12, 384, 4, 768), **_IWSLT, **_SIMPLE, "dropout": 0.4},
    "muse_wmt_en_de": {**_both("M", 12, 768, 16, 3072), **_EN_DE, **_NOISY, "dropout": 0.3},
    "muse_wmt_en_fr": {**_both("M", 12, 768, 16, 3072), **_EN_FR, **_NOISY, "dropout": 0.1},
    "transformer_iwslt": {**_both("S", 6, 512, 4, 1024), **_IWSLT, "dropout": 0.3},
    "transformer_base": {**_both("S", 6, 512, 8, 2048), **_EN_DE, "dropout": 0.1},
    "transformer_big": {**_both("S", 6, 1024, 16, 4096), **_EN_DE, "dropout": 0.3},
}
# Published parameter counts. Exact numbers: the authors' own runs, norms that are never called
# included. The others: the paper's tables 1 and 5; for base and big, arXiv 1706.03762, table 3,
# with about 37,000 tokens.
FIGURES: dict[str, tuple[float, None, None]] = {
    name: (parameters, None, None)
    for name, parameters in {
        "muse_iwslt": 48_193_584,
        "muse_simple_iwslt": 44e6,
        "muse_wmt_en_de": 243e6,
        "muse_wmt_en_fr": 252_088_368,
        "transformer_iwslt": 41e6,
        "transformer_base": 65e6,
        "transformer_big": 213e6,
    }.items()
}
Caches = dict[str, Any]
Variables = dict[str, Any]  # "params", as flax has them
RESERVED = (
    "features", "heads", "hidden", "causal", "memory_features", "pre_norm", "zero_padding",
    "activation", "dropout", "attention_dropout", "activation_dropout", "dtype",
)  # fmt: skip
PER_LAYER = {"windows": 2, "window": 1}  # options that may be one per layer: nested this deep


class EncoderDecoder(nn.Module):
    """(source [b, ls], target [b, lt]) -> (logits [b, lt, target_vocab], intermediates).

    Tokens are int32; `target` is the decoder's input, beginning with `start`. Padding with `pad`
    may be on either side. `intermediates`: "encoder" [b, ls, d], "decoder" [b, lt, e], and the
    output of every layer, "encoder_layer1" and so on. With ``mutable=["intermediates"]``, flax also
    returns the attention weights of every layer. A single stage is an encoder: called without
    `target`, it returns "encoder" in place of logits.

    Attributes:
      source_vocab, target_vocab: sizes of the vocabularies.
      embeddings: "shared": one table for source, target and logits; "decoder": one for target and
        logits; "separate": three.
      layout: letters of the encoder and the decoder, see `localglobal_jax.models.layout`.
      depths, widths, heads, hidden, pre_norm: one of each per stage. `hidden`: width of the
        pointwise nets; `pre_norm`: layers norm their input, not their output.
      blocks: letter -> options of that layer; ``{"M": {"windows": ((3,), (7,), (15,))}}`` gives
        each layer its own.
      positions: "sinusoidal", or "none" (for layers that know displacements).
      pad, start, end: tokens. The first real token has position pad + 1, as in fairseq.
      pad_values: "zero": padding of the source has no effect on any output; "keep": its values
        enter the encoder's convolutions, as in the published code.
      target_padding: "mask": the same for the target; "attend": its padding is a token like
        others for attention and, in decoding, for positions, as in the published code.
      activation: of the pointwise nets.
      dropout: of embeddings and branches; `attention_dropout`, `activation_dropout`.
      dtype: of activations; parameters and logits are float32.

    >>> module = lg.models.EncoderDecoder(
    ...     source_vocab=50, target_vocab=50, depths=(1, 1), widths=(16, 16), heads=(2, 2),
    ...     hidden=(32, 32), blocks={"M": {"windows": (3,)}},
    ... )
    >>> source, target = jnp.ones((2, 7), "int32"), jnp.ones((2, 5), "int32")
    >>> (logits, _), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), source, target)
    >>> logits.shape
    (2, 5, 50)
    """

    source_vocab: PositiveInt = 1000
    target_vocab: PositiveInt = 1000
    embeddings: Literal["shared", "decoder", "separate"] = "shared"
    layout: str | tuple[str, ...] = "MM"
    depths: tuple[int, ...] = (6, 6)
    widths: tuple[int, ...] = (512, 512)
    heads: tuple[PositiveInt, ...] = (8, 8)
    hidden: tuple[PositiveInt, ...] = (1024, 1024)
    pre_norm: tuple[bool, ...] = (False, False)
    blocks: Mapping[str, Mapping[str, Any]] = FrozenDict()
    positions: Literal["sinusoidal", "none"] = "sinusoidal"
    pad: int = 1
    start: int = 2
    end: int = 2
    pad_values: Literal["zero", "keep"] = "zero"
    target_padding: Literal["mask", "attend"] = "mask"
    activation: Activation = "relu"
    dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    activation_dropout: Fraction = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", layouts.hashable(self.blocks))
        super().__post_init__()

    @nn.nowrap
    def stages(self) -> tuple[layouts.Stage, ...]:
        """The encoder and, if there is one, the decoder. Raises ValueError for wrong fields."""
        ones = (1,) * len(self.layout)
        stages = layouts.parse(self.layout, self.depths, self.widths, ones, blocks=SEQUENCE_BLOCKS)
        used = {(letter, i) for stage in stages for i, letter in enumerate(stage.letters)}
        for letter, i in sorted(used | {(letter, 0) for letter in self.blocks}):
            if letter in self.blocks:  # some options may be one per layer
                options = layer_options(self.blocks[letter], i)
                layouts.check_options({letter: options}, SEQUENCE_BLOCKS, RESERVED)
        for name in ("heads", "hidden", "pre_norm"):
            if len(getattr(self, name)) != len(stages):
                raise ValueError(
                    f'layout "{self.layout}" names {len(stages)} stages, '
                    f"but {name}={getattr(self, name)} has {len(getattr(self, name))}"
                )
        if len(stages) > 2:
            raise ValueError(f'layout "{self.layout}": give one stage (an encoder) or two')
        same = self.source_vocab == self.target_vocab and len(set(self.widths)) == 1
        if len(stages) == 2 and self.embeddings == "shared" and not same:
            raise ValueError(
                f"embeddings=shared needs one vocabulary and one width, not {self.source_vocab}, "
                f'{self.target_vocab} and {self.widths}: use "decoder" or "separate"'
            )
        return stages

    def setup(self) -> None:
        encoder, *decoder = self.stages()
        separate = bool(decoder) and self.embeddings != "shared"
        name = "source_embedding" if separate else "embedding"
        self.source_table = self._table(self.source_vocab, encoder.width, name)
        self.encoder = self._stack(0, encoder, None)
        self.drop = nn.Dropout(self.dropout)
        if decoder:
            (stage,) = decoder
            self.decoder = self._stack(1, stage, encoder.width)
            self.target_table = self.output_table = self.source_table
            if separate:
                table = self._table(self.target_vocab, stage.width, "target_embedding")
                self.target_table = self.output_table = table
            if self.embeddings == "separate":
                self.output_table = self._table(self.target_vocab, stage.width, "output_embedding")

    def __call__(
        self,
        source: Int[Array, "b ls"],
        target: Int[Array, "b lt"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b l v"], dict[str, Float[Array, "b _ _"]]]:
        for tokens in (source, target):
            if tokens is not None:
                check_input(self, tokens, "b l")
        encoded, mask, layers = self._encode(source, train)
        intermediates = {f"encoder_{name}": y for name, y in layers.items()}
        intermediates["encoder"] = encoded
        if len(self.layout) == 1:
            return encoded, intermediates
        if target is None:
            raise ValueError("an encoder-decoder needs a target: (source, target)")
        real = target != self.pad
        x = self._embed(self.target_table, target, self.pad + jnp.cumsum(real, 1), real)
        x, layers = self.decoder(
            self.drop(x, deterministic=not train),
            mask=real if self.target_padding == "mask" else None,
            memory=self.decoder.precompute_kv(encoded, mask),
            train=train,
        )
        intermediates |= {f"decoder_{name}": y for name, y in layers.items()}
        intermediates["decoder"] = x
        return self._logits(x), intermediates

    def encode(self, source: Int[Array, "b ls"]) -> Float[Array, "b ls d"]:
        """Returns the encoder's output."""
        return self._encode(source, False)[0]

    def init_cache(
        self, source: Int[Array, "b ls"], length: int
    ) -> tuple[dict[str, CrossKV], Caches]:
        """Returns the initial state of decoding `source`: ``(memory, cache)`` for `length` steps.

        The memory (keys and values of the encoder's output) is the same at every step and may serve
        several rows per sentence. `step` takes and returns the cache; axis 0 of every leaf
        is the row, so that rows can be reordered.
        """
        if len(self.layout) == 1:
            raise ValueError(
                f'layout "{self.layout}" is an encoder alone and cannot decode: give two stages'
            )
        encoded, mask, _ = self._encode(source, False)
        rows = source.shape[0]
        cache: Caches = self.decoder.init_cache(rows, length)
        cache["index"] = jnp.zeros(rows, jnp.int32)  # all rows are at the same step
        if self.target_padding == "mask":
            cache["valid"] = jnp.zeros((rows, length), bool)
        return self.decoder.precompute_kv(encoded, mask), cache

    def step(
        self, token: Int[Array, " r"], memory: dict[str, CrossKV], cache: Caches
    ) -> tuple[Float[Array, "r v"], Caches]:
        """Returns logits after one more token, and the new cache; r: a multiple of memory's rows.

        Repeated for every token, this gives the logits of ``__call__`` for the whole target; with
        ``target_padding="attend"`` only up to the first padding, as in the published code.
        """
        index, valid = cache["index"][0], cache.get("valid")
        if valid is None:
            position, real = self.pad + 1 + cache["index"], jnp.ones(token.shape, bool)
        else:
            real = token != self.pad
            valid = jax.lax.dynamic_update_slice_in_dim(valid, real[:, None], index, axis=1)
            position = self.pad + valid.sum(1)
        x = self._embed(self.target_table, token[:, None], position[:, None], real[:, None])
        x, new = self.decoder.step(x, cache, index, valid=valid, memory=memory)
        cache = {**cache, **new, "index": cache["index"] + 1}
        if valid is not None:
            cache["valid"] = valid
        return self._logits(x)[:, 0], cache

    @nn.nowrap
    def narrowed(self, variables: Variables) -> Variables:
        """Returns variables with the matrices in `dtype`, for `step`: the same numbers.

        Every layer rounds its matrices to `dtype`. In a loop over tokens XLA on GPU rounds them
        again for every token, at three times the bytes of reading them.
        """

        def round_matrix(path: Any, leaf: Array) -> Array:
            matrix = MATRIX.fullmatch(getattr(path[-1], "key", ""))
            return leaf.astype(self.dtype) if matrix else leaf

        return jax.tree_util.tree_map_with_path(round_matrix, variables)

    def _encode(
        self, source: Array, train: bool
    ) -> tuple[Array, Bool[Array, "b ls"], dict[str, Array]]:
        real = source != self.pad
        x = self._embed(self.source_table, source, self.pad + jnp.cumsum(real, 1), real)
        x, layers = self.encoder(self.drop(x, deterministic=not train), mask=real, train=train)
        return x, real, layers

    def _embed(self, table: nn.Embed, tokens: Array, positions: Array, real: Array) -> Array:
        """Returns sqrt(d) times the embedding, plus the position; padding has no position."""
        x = table(tokens) * jnp.asarray(table.features**0.5, self.dtype)
        if self.positions == "none":
            return x
        waves = sinusoids(positions, table.features)
        return x + jnp.where(real[..., None], waves, 0).astype(self.dtype)

    def _logits(self, x: Array) -> Array:
        table = self.output_table.embedding.astype(self.dtype)
        return wide_product(x, table)

    @nn.nowrap
    def _table(self, vocabulary: int, width: int, name: str) -> nn.Embed:
        def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
            table = nn.initializers.normal(width**-0.5)(key, shape, dtype)
            return table.at[self.pad].set(0)

        return nn.Embed(vocabulary, width, dtype=self.dtype, embedding_init=init, name=name)

    @nn.nowrap
    def _stack(self, index: int, stage: layouts.Stage, memory_features: int | None) -> "Stack":
        shared = {
            "features": stage.width,
            "heads": self.heads[index],
            "hidden": self.hidden[index],
            "causal": index == 1,
            "memory_features": memory_features,
            "pre_norm": self.pre_norm[index],
            "zero_padding": index == 1 or self.pad_values == "zero",
            "activation": self.activation,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "activation_dropout": self.activation_dropout,
            "dtype": self.dtype,
        }
        name = ("encoder", "decoder")[index]
        return Stack(stage.letters, self.blocks, shared, name=name)


class Stack(nn.Module):
    """Consecutive layers, with a final norm if the layers norm their input.

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
        memory: Mapping[str, CrossKV] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l d"], dict[str, Float[Array, "b l d"]]]:
        """Returns the output, and the output of every layer."""

        def call(layer: nn.Module, x: Array, extra: tuple[Any, Any]) -> Array:
            mask, memory = extra
            return layer(x, mask=mask, memory=memory, train=train)

        names, layers = zip(*self._named(), strict=True)
        extras = [(mask, None if memory is None else memory[name]) for name in names]
        outputs = apply_blocks(self, layers, x, call, extras)
        return self._last(outputs[-1]), dict(zip(names, outputs, strict=True))

    def precompute_kv(
        self, encoded: Float[Array, "b m e"], mask: Bool[Array, "b m"]
    ) -> dict[str, CrossKV]:
        """Returns the keys and values of the encoder's output for every layer."""
        return {name: layer.precompute_kv(encoded, mask) for name, layer in self._named()}

    def init_cache(self, batch: int, length: int) -> dict[str, Cache]:
        """Returns empty caches for `length` positions."""
        return {name: layer.init_cache(batch, length) for name, layer in self._named()}

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cache: Mapping[str, Cache],
        index: Int[Array, ""],
        *,
        valid: Bool[Array, "b m"] | None,
        memory: Mapping[str, CrossKV],
    ) -> tuple[Float[Array, "b 1 d"], dict[str, Cache]]:
        """Runs one position through all layers."""
        new = {}
        for name, layer in self._named():
            x, new[name] = layer.step(x, cache[name], index, valid=valid, memory=memory[name])
        return self._last(x), new

    @nn.nowrap
    def _named(self) -> list[tuple[str, Any]]:
        return [(f"layer{i + 1}", layer) for i, layer in enumerate(self.layers)]

    def _last(self, x: Array) -> Array:
        return self.norm(x) if self.shared["pre_norm"] else x


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
    """Returns the options of one layer: per-layer options are indexed by `layer`."""

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
