# SPDX-License-Identifier: Apache-2.0
"""Measures natural long sentences and joined short ones of the same length -> results.csv.

    python -m experiments.length_or_difficulty.measure runs/length/one

For each natural test sentence of a bucket of lengths, short test sentences are joined to about as
many source tokens. A row is a run and a bucket: loss per target token of the natural sentences, of
the joined ones, and of the same short sentences alone; "short" is the loss of natural short ones.
The first token of a sentence and the end are left out, because a model cannot know whether another
sentence follows. Continues where it was stopped.
"""

import pathlib
import sys

import numpy as np

from experiments import text_runs
from experiments.length_or_difficulty import prepare
from localglobal_jax.data.text import pairs
from localglobal_jax.inference import bleu
from localglobal_jax.launch import status

HERE = pathlib.Path(__file__).parent
SHORTEST = 16  # source tokens of the natural short sentences, at most
BUCKETS = ((17, 32), (33, 64), (65, 96))  # source tokens, the end included
COLUMNS = ("commit", "operator", "positions", "seed", "norm", "learning_rate", "warmup", "bucket")
COLUMNS += ("sentences", "tokens_natural", "tokens_joined")
COLUMNS += ("natural", "joined", "alone", "short", "bleu_natural", "bleu_joined", "bleu_alone")
OPERATORS = {"S": "attention", "T": "attention", "D": "convolution", "M": "both"}


def about(trained):
    """Returns the model and the setting of a run."""
    model, optim = trained.run.model, trained.run.optim
    letter, absolute = model["layout"][0], model["positions"] == "sinusoidal"
    return {
        "commit": status.environment(str(trained.workdir)).get("commit", ""),
        "operator": OPERATORS[letter],
        "positions": "absolute" if absolute else "relative" if letter == "T" else "none",
        "seed": trained.seed,
        "norm": "pre" if model["pre_norm"][0] else "post",
        "learning_rate": optim.learning_rate,
        "warmup": optim.warmup_steps,
    }


def mean(losses):
    """Returns the loss per target token of [sentences, (sum, first, tokens)], without the first."""
    total, first, tokens = losses.sum(0)
    return (total - first) / (tokens - len(losses))


def measure(trained, buckets=BUCKETS, shortest=SHORTEST):
    """Yields a row for each bucket that has sentences."""
    read = pairs.read(trained.run.data, "test")
    natural = list(dict(zip(read.sources, read.targets, strict=True)).items())
    sources = trained.translator.tokenizers.source.encode([source for source, _ in natural])
    sizes = np.array([len(ids) + 1 for ids in sources])
    alone = text_runs.sentence_losses(trained, [[pair] for pair in natural])
    say = trained.translator.translate
    said = [found.text for found in say([source for source, _ in natural], beam=1)]
    brief = [i for i, pair in enumerate(natural) if prepare.is_short(pair)]
    base = mean(np.concatenate([alone[i] for i in np.flatnonzero(sizes <= shortest)]))
    for first, last in buckets:
        chosen = np.flatnonzero((sizes >= first) & (sizes <= last))
        if not len(chosen):
            continue
        rng = np.random.default_rng(first)  # the same groups for every model with this vocabulary
        drawn = prepare.groups(sizes[chosen] - 1, sizes[brief] - 1, rng)
        members = [[brief[i] for i in group] for group in drawn]
        groups = [[natural[i] for i in group] for group in members]
        together = np.concatenate(text_runs.sentence_losses(trained, groups))
        inputs, references = zip(*map(prepare.joined, groups), strict=True)
        outputs = [found.text for found in say(list(inputs), beam=1)]
        apart = [" ".join(said[i] for i in group) for group in members]
        scores = {
            "natural": ([said[i] for i in chosen], [natural[i][1] for i in chosen]),
            "joined": (outputs, references),
            "alone": (apart, references),
        }
        yield {
            **about(trained),
            "bucket": f"{first}-{last}",
            "sentences": len(chosen),
            "tokens_natural": f"{sizes[chosen].mean():.2f}",
            "tokens_joined": f"{np.mean([sum(sizes[i] - 1 for i in g) + 1 for g in members]):.2f}",
            "natural": f"{mean(np.concatenate([alone[i] for i in chosen])):.6f}",
            "joined": f"{mean(together):.6f}",
            "alone": f"{mean(np.concatenate([alone[i] for group in members for i in group])):.6f}",
            "short": f"{base:.6f}",
            **{f"bleu_{k}": f"{bleu.score(*both)['bleu']:.4f}" for k, both in scores.items()},
        }


def main(root, out=HERE / "results.csv"):
    text_runs.measured(text_runs.finished(root), pathlib.Path(out), COLUMNS, measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
