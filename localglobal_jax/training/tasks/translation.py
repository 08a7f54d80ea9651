# SPDX-License-Identifier: Apache-2.0
"""Translation: a batch is pairs of sentences as token ids (see `data.text`)."""

import logging
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from localglobal_jax.checkpoints.workdir import shown
from localglobal_jax.config import schema
from localglobal_jax.data.text import bucketing, pairs, pipeline, tokenizers
from localglobal_jax.inference import bleu, decoding, hub
from localglobal_jax.inference.translator import tokenizers_of
from localglobal_jax.models.registry import create_model
from localglobal_jax.training import losses, metrics
from localglobal_jax.training.tasks.task import Batch, Evaluator, HostBatch, Loss, Task, Variables

USE = """translator = lg.load_translator("path/to/this/directory")
print(translator.translate(["A sentence."])[0].text)"""
UNKNOWN = 0.05  # share of unknown tokens above which a warning is logged
log = logging.getLogger(__name__)


def create(
    run: schema.TranslationRun,
    *,
    shard: tuple[int, int] = (0, 1),
    parts: int | None = None,
    train: bool = True,
    workdir: pathlib.Path | None = None,
) -> Task:
    """Creates the task of `run`: opens its data, loads or trains its tokenizers, checks its model.

    The tokenizers are those of `workdir`, or of the run that ``init`` names; else they are trained
    on the training split, and ``Task.save`` stores them.
    """
    vocabularies = stored_tokenizers(run, workdir)
    source = pipeline.open_train(run.data, vocabularies) if train else None
    if source and source.unknown > UNKNOWN:
        log.warning(
            "%.0f %% of the tokens are unknown: check data.tokenizer and data.vocab",
            100 * source.unknown,
        )
    vocabularies = source.tokenizers if source else vocabularies
    if vocabularies is None:
        raise ValueError(
            f"{shown(workdir or '')} has no {tokenizers.DIRECTORY}: give the workdir of a "
            "translation run"
        )
    spec = model_spec(run, vocabularies)
    model = create_model(**spec)
    if getattr(model, "embeddings", None) == "shared" and not vocabularies.same:
        raise ValueError(
            "model.embeddings=shared, but source and target have different vocabularies: "
            "set model.embeddings=separate (or decoder), or data.joint=True"
        )
    example = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    try:
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, x, train=False), example)
    except (ValueError, MemoryError) as error:
        raise ValueError(f"config.model: {error}") from error

    def train_batches(start: int, stop: int) -> Iterator[HostBatch]:
        assert source is not None, "this task was created with train=False"
        return pipeline.train_batches(
            source,
            tokens=run.batch_size,
            multiple=run.data.rows_multiple,
            seed=run.seed,
            start=start,
            stop=stop,
            shard=shard,
            threads=run.data.threads,
            workers=run.data.workers,
        )

    if source:
        pipeline.check_budget(source, run.batch_size, run.data.rows_multiple)
    edges = source.edges if source else ()
    budget = bucketing.Budget(
        run.eval.batch_size or run.batch_size, run.data.rows_multiple, parts, run.data.max_length
    )
    evaluated = {
        split: pipeline.open_eval(run.data, split, vocabularies, edges, budget)
        for split in run.data.eval_splits
    }
    return Task(
        model=model,
        model_spec=spec,
        inputs=(example, example),
        loss=lambda variables, batch, key: loss(model, run, variables, batch, key),
        train_batches=train_batches,
        evaluators=create_evaluators(model, run, evaluated, budget, shard=shard),
        items="tokens",
        order=source.order if source else "",
        use=USE,
        summary=f"{run.data.name}/{run.data.train_split}: {source.summary if source else 'text'}",
        save=lambda directory: tokenizers.save(vocabularies, directory / tokenizers.DIRECTORY),
    )


def stored_tokenizers(
    run: schema.TranslationRun, workdir: pathlib.Path | None
) -> tokenizers.Tokenizers | None:
    """Loads the tokenizers of the workdir, or of the run ``init``; None if they must be trained.

    Raises ValueError where ``init`` has none: its embeddings belong to its vocabulary.
    """
    found = tokenizers.load(workdir / tokenizers.DIRECTORY) if workdir else None
    if found is None and workdir and (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"{shown(workdir)} has checkpoints but no {tokenizers.DIRECTORY}: restore it; a new "
            "one may have another vocabulary"
        )
    if found is None and run.init:
        try:
            found = tokenizers_of(hub.local(run.init))
        except OSError as error:  # not a valid path, such as one that is too long
            raise ValueError(f"init={run.init}: {error.strerror or error}") from error
        if found is None:
            raise ValueError(
                f"init={run.init} has no {tokenizers.DIRECTORY}: give the workdir of a translation "
                "run, or of a conversion with --dict"
            )
        log.info("tokens   of %s; data.tokenizer, vocab, joint and dicts are not used", run.init)
    return found


def model_spec(run: schema.TranslationRun, vocabularies: tokenizers.Tokenizers) -> dict[str, Any]:
    """Returns the arguments of `create_model`, with vocabularies from the tokenizers."""
    given = {
        "source_vocab": vocabularies.source.size,
        "target_vocab": vocabularies.target.size,
        "pad": tokenizers.PAD,
        "start": tokenizers.EOS,
        "end": tokenizers.EOS,
        "dtype": run.dtype,
    }
    for field in given:
        if field in run.model:
            raise ValueError(f"model.{field} is determined by the run and its data: leave it out")
    return {**run.model, **given}


def loss(
    model: nn.Module,
    run: schema.TranslationRun,
    variables: Variables,
    batch: Batch,
    key: jax.Array,
) -> Loss:
    """Computes the cross-entropy of a training batch, summed over its tokens."""
    (logits, _), collections = model.apply(
        variables,
        batch["source"],
        batch["target_input"],
        train=True,
        rngs={"dropout": key},
        mutable=[name for name in variables if name != "params"],
    )
    mask = batch["mask"]
    smooth = losses.cross_entropy(logits, batch["target"], label_smoothing=run.task.label_smoothing)
    exact = losses.cross_entropy(logits, batch["target"])
    total, weight = jnp.sum(smooth * mask), jnp.sum(mask)
    sums = {"loss": (total, weight), "nll": (jnp.sum(exact * mask), weight)}
    return Loss(total, weight, sums, collections)


def create_evaluators(
    model: nn.Module,
    run: schema.TranslationRun,
    sources: Mapping[str, pipeline.TextSource],
    budget: bucketing.Budget,
    *,
    shard: tuple[int, int],
) -> dict[str, Evaluator]:
    """Creates the evaluator of every split, which measure and translate by the same functions.

    Per token: the training loss, the loss without label smoothing ("nll"), its perplexity, and
    accuracy. Unless ``task.beam`` is 0, also BLEU and chrF of the translations.
    """
    names: tuple[str, ...] = ("loss", "nll", "accuracy", "perplexity", "count")
    smoothing = run.task.label_smoothing

    def measure(variables: Variables, batch: Batch) -> metrics.Sums:
        logits, _ = model.apply(variables, batch["source"], batch["target_input"], train=False)
        sums = metrics.tokens(logits, batch["target"], batch["mask"])
        trained = losses.cross_entropy(logits, batch["target"], label_smoothing=smoothing)
        return {"loss": (jnp.sum(trained * batch["mask"]), sums["nll"][1]), **sums}

    def translate(variables: Variables, batch: Batch) -> PyTree:
        found = decoding.beam_search(
            model,
            variables,
            batch["source"],
            beam=run.task.beam,
            length_penalty=run.task.length_penalty,
            max_length=decoding.max_length(batch["source"].shape[1]),
        )
        real = batch["mask"].any(1)  # rows that pad the last batch have an empty mask
        return {"index": jnp.where(real, batch["index"], -1), "tokens": found.tokens[:, 0]}

    def create_evaluator(split: str, source: pipeline.TextSource) -> Evaluator:
        summary = f"{run.data.name}/{split}: {source.summary}"
        options: dict[str, Any] = {}
        if run.task.beam:
            options = _bleu_options(run, source)
            summary += f"; BLEU {bleu.signature(**options)}"

        def batches() -> Iterator[HostBatch]:
            return pipeline.eval_batches(
                source,
                budget=budget,
                shard=shard,
                threads=run.data.threads,
                workers=run.data.workers,
            )

        def finish(means: dict[str, float], predicted: list[PyTree]) -> dict[str, float]:
            means = {**means, "perplexity": math.exp(min(means["nll"], 700))}
            return means | (score(source, predicted, options) if predicted else {})

        return Evaluator(
            batches,
            measure,
            (*names, "bleu", "chrf") if run.task.beam else names,
            size=lambda: source.tokens,
            predict=translate if run.task.beam else None,
            finish=finish,
            summary=summary,
        )

    return {
        schema.evaluation_name(split): create_evaluator(split, source)
        for split, source in sources.items()
    }


def _bleu_options(run: schema.TranslationRun, source: pipeline.TextSource) -> dict[str, Any]:
    """Returns the options of `bleu.score` for the references of a split."""
    assert source.text is not None, "a training split has no references"
    target = source.tokenizers.target
    if target.tokenized:
        return {"tokenized": True}
    name: str = run.task.bleu_tokenizer
    if name == "auto":
        name = bleu.choose_tokenizer(pairs.target_language(run.data), source.text.targets)
    try:
        bleu.check_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"task.bleu_tokenizer={name}: {error}") from error
    return {"tokenize": name}


def score(
    source: pipeline.TextSource, predicted: list[PyTree], options: dict[str, Any]
) -> dict[str, float]:
    """Returns BLEU and chrF of the predictions for a split, and BLEU by source length.

    `options`: the tokenizer, see `bleu.score`.
    """
    assert source.text is not None, "a training split has no references"
    hypotheses = {
        int(index): source.tokenizers.target.decode(tokens)
        for batch in predicted
        for index, tokens in zip(batch["index"], batch["tokens"], strict=True)
        if index >= 0
    }
    in_order = [hypotheses[index] for index in range(len(source))]
    vocabularies = source.tokenizers
    references = [vocabularies.target.plain(text) for text in source.text.targets]
    sources = [vocabularies.source.plain(text) for text in source.text.sources]
    found = bleu.score(in_order, references, sources, **options)
    by_length = {
        f"bleu_{line['words'].replace('>', 'over_')}": line["bleu"]  # TensorBoard rejects ">"
        for line in found["by_length"]
    }
    return {"bleu": found["bleu"], "chrf": found["chrf"], **by_length}
