# SPDX-License-Identifier: Apache-2.0
"""Translation with a trained model: lines of text in, translations out, in order.

    translator = lg.load_translator("runs/muse")        # a workdir, or a converted checkpoint
    for found in translator.translate(["Click the button.", ""], beam=4):
        print(found.text)

Sentences are batched by length, in a few static shapes, each compiled once. The translation of a
line does not depend on the other lines. Nothing is printed here, see `cli.translate`.
"""

import collections
import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from localglobal_jax.checkpoints import gcs, reader
from localglobal_jax.data.text.tokenizers import DIRECTORY, UNK, Tokenizers
from localglobal_jax.data.text.tokenizers import load as load_tokenizers
from localglobal_jax.inference import decoding, heat_map, hub
from localglobal_jax.inference import load as inference_load
from localglobal_jax.models import EncoderDecoder
from localglobal_jax.models.registry import Variables
from localglobal_jax.parallel import context

SHORTEST = 16  # tokens of the first length bucket; each next one is twice as long
BATCH = 2048  # tokens
LONGEST = 1024  # tokens of a source
DTYPES = ("float32", "bfloat16")
NOT_FINITE = "the scores of the model are not finite numbers"
ONE_LINE = str.maketrans("\n\r\t\0", "    ")  # a model with a byte vocabulary can output these


class Hypothesis(NamedTuple):
    """One translation. `tokens` and `token_scores` include the end token."""

    text: str
    score: float  # the sum of the token scores over length ** length_penalty
    tokens: tuple[int, ...]
    token_scores: tuple[float, ...]  # natural logarithms of probabilities


class Translation(NamedTuple):
    """The result of one line. Without hypotheses the line is blank, or `problem` has the reason."""

    tokens: int  # of the source, the end token included
    hypotheses: tuple[Hypothesis, ...]  # best first
    problem: str = ""
    unknown: int = 0  # tokens of the source that the vocabulary does not have

    @property
    def text(self) -> str:
        """Returns the best translation, in one line; empty if there is none."""
        return self.hypotheses[0].text if self.hypotheses else ""


class Sampling(NamedTuple):
    """Options of random sampling in place of beam search, see `decoding.sample`."""

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Attention(NamedTuple):
    """Cross-attention of target pieces to source pieces. Rows of `weights` sum to 1."""

    weights: np.ndarray  # [target, source]
    source: list[str]
    target: list[str]
    title: str

    def draw(self, file: str | BinaryIO, *, titled: bool = True) -> None:
        """Draws the weights as a heat map, see `heat_map.draw`."""
        heat_map.draw(
            file,
            self.weights,
            rows=self.target,
            columns=self.source,
            row_name="translation",
            column_name="source",
            title=self.title if titled else "",
        )


class Translator:
    """A trained model and its tokenizers.

    In the published code, padding enters the convolution of the encoder, so that a translation
    depends on the longest sentence of its batch. Here padding is zero (``pad_values="zero"``):
    every line gets the translation that the published code gives it in a batch of its own.

    With `others`, modules and variables of the same vocabularies, it is a `decoding.Ensemble`;
    attention maps and the replacement of unknown tokens are then those of the first model.

    Raises ValueError for a module that does not translate, or tokenizers of another size.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        tokenizers: Tokenizers,
        others: Sequence[tuple[nn.Module, Variables]] = (),
    ):
        sizes = tuple(side.size for side in tokenizers)
        modules: list[Any] = []
        for one in (module, *(other for other, _ in others)):
            if not isinstance(one, EncoderDecoder) or len(one.layout) != 2:
                raise ValueError(
                    f"a {type(one).__name__} does not translate: give an encoder-decoder"
                )
            if sizes != (one.source_vocab, one.target_vocab):
                raise ValueError(
                    f"the tokenizers have {sizes[0]} source and {sizes[1]} target ids, but the "
                    f"model has source_vocab={one.source_vocab} and "
                    f"target_vocab={one.target_vocab}: give the tokenizers of the model's own run"
                )
            modules.append(one.clone(pad_values="zero"))
        self.module: Any = modules[0]
        self.variables, self.tokenizers = variables, tokenizers
        self._searched: tuple[Any, Any] = self.module, variables
        if others:
            everything = (variables, *(theirs for _, theirs in others))
            self._searched = decoding.Ensemble(tuple(modules)), everything

    def translate(
        self,
        lines: Sequence[str],
        *,
        beam: int = 4,
        nbest: int = 1,
        length_penalty: float = 1.0,
        min_length: int = 1,
        max_length: int | None = None,
        sampling: Sampling | None = None,
        replace_unknown: bool = False,
        batch_size: int = BATCH,
        max_source: int = LONGEST,
        first: int = 0,
    ) -> list[Translation]:
        """Returns one `Translation` per line, in the order of `lines`.

        Args:
          lines: sentences, tokenised as the training text was.
          beam: hypotheses that the search keeps.
          nbest: how many of them to return.
          length_penalty: exponent of the length that divides a score.
          min_length, max_length: tokens of a translation, without the end token. None: the value of
            `decoding.max_length` for the length bucket of the source.
          sampling: draws `nbest` hypotheses at random in place of the search.
          replace_unknown: puts, for each unknown token of a translation, the source token that
            gets most of its cross-attention (fairseq's ``--replace-unk``).
          batch_size: source tokens in a batch, padding included.
          max_source: tokens. A longer line is not translated; its `problem` has the reason.
          first: number of the first line. The random numbers of a line are a function of the seed
            and the number of the line.

        Raises ValueError for options out of range.
        """
        if isinstance(lines, str):
            raise ValueError("lines is one string: give a list of strings")
        if min(nbest, batch_size, max_source) < 1 or (nbest > beam and sampling is None):
            raise ValueError(
                f"nbest={nbest}, beam={beam}, batch_size={batch_size}, max_source={max_source}: "
                "give at least 1 for each, and nbest <= beam"
            )
        if sampling and not 0 <= sampling.seed < 2**32:
            raise ValueError(f"seed={sampling.seed}: give a number from 0 to {2**32 - 1}")
        ids = self._encode(lines)
        problem = f"{{}} tokens, but at most {max_source} are translated (max_source)"
        found = [
            Translation(
                len(line),
                (),
                problem.format(len(line)) if len(line) > max_source else "",
                line.count(UNK),
            )
            for line in ids
        ]
        for length, members in self._buckets(ids, max_source):
            rows = rows_of(len(members), max(1, batch_size // length))
            longest = max_length
            if max_length is None:
                longest = max(min_length, decoding.max_length(length))
            options = {"length_penalty": length_penalty, "min_length": min_length}
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                # filled up with its shortest line: a row of padding might never reach the end token
                numbers = np.array(batch + batch[:1] * (rows - len(batch)))
                source = self._padded([ids[i] for i in numbers], length)
                search = self._search(beam, nbest, sampling, first + numbers)
                hypotheses = search(source, max_length=longest, **options)
                host = jax.device_get(hypotheses)
                for row, i in enumerate(batch):
                    read = self._read(host, row, nbest)
                    if not all(math.isfinite(one.score) for one in read) or not read:
                        found[i] = found[i]._replace(problem=NOT_FINITE)
                        continue
                    if replace_unknown:
                        read = tuple(self._replaced(lines[i], ids[i], one) for one in read)
                    found[i] = found[i]._replace(hypotheses=read)
        return found

    def attention(self, line: str, hypothesis: Hypothesis) -> Attention:
        """Returns the cross-attention between a line and one of its hypotheses.

        The weights are the mean over layers and heads. Raises ValueError for a line without words.
        """
        (ids,) = self._encode([line])
        if not ids:
            raise ValueError(f"line={line!r} has no words to attend to")
        before = (self.module.start, *hypothesis.tokens[:-1])
        source, target = (jnp.asarray([side], jnp.int32) for side in (ids, before))
        layers = _cross_attention(self.module, self.variables, source, target)
        counts = {"layer": len(layers), "head": layers[0].shape[1]}
        both = " and ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items())
        return Attention(
            np.mean([np.asarray(layer[0], np.float32).mean(0) for layer in layers], axis=0),
            self.tokenizers.source.pieces(ids),
            self.tokenizers.target.pieces(hypothesis.tokens),
            f"cross-attention, mean of {both}",
        )

    def _replaced(self, line: str, ids: list[int], hypothesis: Hypothesis) -> Hypothesis:
        """Returns the hypothesis with words of the source for its unknown tokens."""
        if UNK not in hypothesis.tokens:
            return hypothesis
        before = [self.module.start, *hypothesis.tokens[:-1]]
        source, target = (
            jnp.asarray(self._padded([side], bucket_of(len(side)))) for side in (ids, before)
        )
        layers = _cross_attention(self.module, self.variables, source, target)
        weights = np.mean([np.asarray(layer[0], np.float32).mean(0) for layer in layers], axis=0)
        given = line.split() if self.tokenizers.source.tokenized else []
        names = given if len(given) == len(ids) - 1 else self.tokenizers.source.pieces(ids[:-1])
        tokenizer = self.tokenizers.target
        pieces = tokenizer.pieces(hypothesis.tokens)
        for place, token in enumerate(hypothesis.tokens):
            if token == UNK and names:
                pieces[place] = names[int(weights[place, : len(names)].argmax())]
        special = tokenizer.pieces([self.module.end])[0]
        text = tokenizer.join([piece for piece in pieces if piece != special])
        return hypothesis._replace(text=text.translate(ONE_LINE))

    def _encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Returns ids and the end token; no ids for a blank line. Runs of blanks count as one."""
        found = self.tokenizers.source.encode([" ".join(line.split()) for line in lines])
        return [[*ids, self.module.end] if ids else [] for ids in found]

    def _buckets(self, ids: list[list[int]], longest: int) -> list[tuple[int, list[int]]]:
        """Returns pairs (padded length, indices of its lines), shortest first."""
        buckets = collections.defaultdict(list)
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            if 0 < len(ids[i]) <= longest:
                buckets[bucket_of(len(ids[i]))].append(i)
        return list(buckets.items())

    def _padded(self, ids: list[list[int]], length: int) -> np.ndarray:
        return np.array([line + [self.module.pad] * (length - len(line)) for line in ids], np.int32)

    def _search(self, beam: int, nbest: int, sampling: Sampling | None, numbers: np.ndarray) -> Any:
        if sampling is None:
            return partial(decoding.beam_search, *self._searched, beam=beam)
        return partial(
            decoding.sample,
            *self._searched,
            key=jax.random.key(sampling.seed),
            numbers=numbers,
            samples=nbest,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    def _read(self, found: decoding.Hypotheses, row: int, nbest: int) -> tuple[Hypothesis, ...]:
        hypotheses = []
        for k in range(nbest):
            if length := int(found.lengths[row, k]):
                tokens = tuple(found.tokens[row, k, :length].tolist())
                text = self.tokenizers.target.decode(tokens).translate(ONE_LINE)
                scores = tuple(found.token_scores[row, k, :length].tolist())
                hypotheses.append(Hypothesis(text, float(found.scores[row, k]), tokens, scores))
        return tuple(hypotheses)


def bucket_of(length: int) -> int:
    """Returns the padded length of a source of `length` tokens: `SHORTEST` times a power of two."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def rows_of(sentences: int, most: int) -> int:
    """Returns the rows per batch for this number of sentences: a power of four, or `most`.

    One sentence is not padded to a whole batch, and few shapes are compiled.
    """
    rows = 1
    while rows < min(sentences, most):
        rows *= 4
    return min(rows, most)


@partial(jax.jit, static_argnums=0)
def _cross_attention(
    module: EncoderDecoder, variables: Variables, source: jax.Array, target: jax.Array
) -> list[jax.Array]:
    """Returns the cross-attention weights of every decoder layer, [b, heads, target, source]."""
    with context.implementation("fused"):
        _, sown = module.apply(variables, source, target, train=False, mutable=["intermediates"])
    leaves = jax.tree_util.tree_leaves_with_path(sown["intermediates"]["decoder"])
    return [leaf for path, leaf in leaves if jax.tree_util.DictKey("cross") in path]


# ---------------------------------------------------------------------------- from disk


def load(
    path: str | pathlib.Path | Sequence[str | pathlib.Path],
    step: int | str | None = None,
    average: int = 1,
    *,
    dtype: str | None = None,
) -> Translator:
    """Loads a translator from a workdir, or from the directory of a converted checkpoint.

    Several paths make an ensemble. `step` and `average`: see `inference.load.load`; they hold for
    every path. `dtype` is that of the computation, one of `DTYPES`; None: that of the run. Decoding
    reads all weights for every token, with bfloat16 half the bytes. Raises ValueError if there is
    no such checkpoint, no tokenizer beside it, or if the tokenizers differ.

    >>> translator = lg.load_translator("runs/muse")
    >>> found = translator.translate(["Click the button."], beam=2)
    >>> best = found[0].hypotheses[0]  # its text, tokens, score and token_scores
    >>> found[0].text == best.text
    True
    """
    paths = [path] if isinstance(path, str | pathlib.Path) else [*path]
    if not paths:
        raise ValueError("load_translator(()): give at least one path")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")
    models, tokenizers = [], None
    for one in map(hub.local, paths):
        module, variables = inference_load.load(one, step, average)
        models.append((module.clone(dtype=dtype) if dtype else module, variables))
        found = tokenizers_of(one)
        if found is None:
            raise ValueError(
                f"{one} has no tokenizer/tokenizer.json. Give the workdir of a translation run, or "
                "convert the checkpoint again with --dict"
            )
        if tokenizers and [x.dump() for x in found] != [x.dump() for x in tokenizers]:
            raise ValueError(
                f"{one} has other tokenizers than {paths[0]}: the models of an ensemble need the "
                "same. Train them on the same data with the same data.vocab, or from the same init"
            )
        tokenizers = found
    assert tokenizers is not None
    return Translator(*models[0], tokenizers, others=models[1:])


def tokenizers_of(path: str | os.PathLike[str]) -> Tokenizers | None:
    """Returns the tokenizers of a workdir, a folder of weights, or the workdir of a step; or None.

    Raises ValueError if they are damaged, OSError for a path that cannot be read.
    """
    places = [path]
    with contextlib.suppress(ValueError):  # a folder of weights has no steps
        steps, _ = reader.locate(path)
        places = [steps.parent if steps.name == "checkpoints" else steps, path]
    found = (load_tokenizers(gcs.LocalMirror(p).local / DIRECTORY) for p in places)
    return next(filter(None, found), None)


def defaults(path: str | pathlib.Path) -> Mapping[str, Any]:
    """Returns beam and length penalty of the run of `path`; 4 and 1 if it is of no run.

    `path`: any that `lg.load` reads.
    """
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):  # reading the weights reports it
        metadata = inference_load.read_metadata(path)
    task = (metadata.get("config") or {}).get("task") or {}
    return {
        "beam": task.get("beam") or 4,  # 0 there: evaluation only measures the loss
        "length_penalty": task.get("length_penalty", 1.0),
    }
