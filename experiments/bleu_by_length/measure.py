# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of length alone -> official.csv, bylength.csv, results.csv.

    python -m experiments.bleu_by_length.measure official muse_test.tsv.gz
    python -m experiments.bleu_by_length.measure runs runs/results

``official``: the published hypotheses of MUSE on IWSLT14 (id, source, target, hypothesis), scored
by length of the source. Only numbers are written. ``runs``: every finished run of muse_results.

Short sentences that training did not see are joined at random, two, four, eight at a time, and
each group is translated as one input, and sentence by sentence: same content, another length.
"""

import argparse
import csv
import gzip
import pathlib
from functools import partial

import numpy as np

from experiments import text_runs
from localglobal_jax.data.text import pairs
from localglobal_jax.inference import bleu

HERE = pathlib.Path(__file__).parent
KS = (1, 2, 4, 8)
LONGEST = 11  # tokens of a short sentence, on either side: eight are within what training saw
ORDERS = 3  # random orders, so that every sentence is in several places
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)  # source tokens, the last of each bucket
JOINED = ("model", "seed", "k", "groups", "source_tokens", "target_tokens", "nll", "nll_alone")
JOINED += (
    "inner",
    "inner_alone",
    "first",
    "first_alone",
    "bleu",
    "bleu_alone",
    "chrf",
    "chrf_alone",
)
JOINED += ("words", "words_alone", "words_reference", *(f"inner_{i}" for i in range(1, 9)))


def official(file):
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        lines = [line.rstrip("\n").split("\t") for line in opened]
    _, sources, references, hypotheses = zip(*lines, strict=True)
    found = bleu.score(hypotheses, references, sources, tokenized=True)
    rows = [{"words": "all", "sentences": len(lines), **found}, *found["by_length"]]
    with open(HERE / "official.csv", "w", newline="") as out:
        writer = csv.DictWriter(
            out, ("words", "sentences", "bleu"), extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({**row, "bleu": f"{row['bleu']:.4f}"} for row in rows)


def by_length(trained):
    """Returns the loss per target token by tokens of the source (teacher forcing)."""
    sums = np.zeros((len(LENGTHS) + 1, 3))
    for batch, loss in text_runs.token_losses(trained, trained.source()):
        length = (batch["source"] != trained.translator.module.pad).sum(1)
        real = batch["mask"].any(1)
        bucket = np.searchsorted(LENGTHS, length)
        for values, column in (
            (real, 0),
            (batch["mask"].sum(1), 1),
            ((loss * batch["mask"]).sum(1), 2),
        ):
            np.add.at(sums[:, column], bucket[real], values[real])
    for last, (count, tokens, loss) in zip((*LENGTHS, 9999), sums, strict=True):
        if count:
            key = {"model": trained.model, "seed": trained.seed, "source_tokens": last}
            yield {
                **key,
                "sentences": int(count),
                "tokens": int(tokens),
                "nll": f"{loss / tokens:.6f}",
            }


def short(trained):
    """Returns short held-out sentences that end in a full stop, once in each random order."""
    read = (pairs.read(trained.run.data, split) for split in ("test", "validation"))
    sides = trained.translator.tokenizers
    chosen = {}
    held_out = [pair for p in read for pair in zip(p.sources, p.targets, strict=True)]
    for source, target in held_out:
        if source.endswith(".") and target.endswith("."):
            size = max(
                len(side.encode([t])[0]) for side, t in zip(sides, (source, target), strict=True)
            )
            if size <= LONGEST:
                chosen.setdefault(source, target)
    rng, found = np.random.default_rng(0), list(chosen.items())
    whole = len(found) // max(KS) * max(KS)
    return [found[i] for _ in range(ORDERS) for i in rng.permutation(len(found))[:whole]]


def grouped(sentences, k):
    return [
        [" ".join(side) for side in zip(*sentences[i : i + k], strict=True)]
        for i in range(0, len(sentences), k)
    ]


def forced(trained, sentences, k):
    """Returns the loss by sentence if k are one input: [sentences, (sum, first token, tokens)]."""
    groups = [sentences[i : i + k] for i in range(0, len(sentences), k)]
    return np.concatenate(text_runs.sentence_losses(trained, groups))


def joined(trained):
    sentences = short(trained)
    say = partial(trained.translator.translate, beam=1)
    once = list(dict.fromkeys(source for source, _ in sentences))
    known = dict(zip(once, (found.text for found in say(once)), strict=True))
    alone = [known[source] for source, _ in sentences]
    alone_loss = forced(trained, sentences, 1)
    for k in KS:
        groups = grouped(sentences, k)
        sources, references = zip(*groups, strict=True)
        together = [found.text for found in say(sources)] if k > 1 else alone
        apart = [" ".join(alone[i : i + k]) for i in range(0, len(alone), k)]
        loss = forced(trained, sentences, k)
        ids = trained.translator.tokenizers.source.encode(list(sources))
        row = {"model": trained.model, "seed": trained.seed, "k": k, "groups": len(groups)}
        row |= {"source_tokens": f"{np.mean([len(i) + 1 for i in ids]):.2f}"}
        row |= {"target_tokens": int(loss[:, 2].sum())}
        row |= {"words_reference": sum(len(r.split()) for r in references)}
        for name, values, said in (("", loss, together), ("_alone", alone_loss, apart)):
            score = bleu.score(said, references)
            total, first, count = values.sum(0)
            row[f"nll{name}"] = f"{total / count:.6f}"
            row[f"inner{name}"] = f"{(total - first) / (count - len(values)):.6f}"
            total, first, count = values[::k].sum(0)  # of the first sentence of every group
            row[f"first{name}"] = f"{(total - first) / (count - len(groups)):.6f}"
            row |= {f"{m}{name}": f"{score[m]:.4f}" for m in ("bleu", "chrf")}
            row[f"words{name}"] = sum(len(s.split()) for s in said)
        for place in range(k):
            total, first, count = loss[place::k].sum(0)
            row[f"inner_{place + 1}"] = f"{(total - first) / (count - len(groups)):.6f}"
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("official", "runs"))
    parser.add_argument("path", help="the .tsv.gz, or the folder of the runs")
    args = parser.parse_args()
    if args.what == "official":
        official(args.path)
        return
    runs = list(text_runs.finished(args.path))
    columns = ("model", "seed", "source_tokens", "sentences", "tokens", "nll")
    text_runs.measured(runs, HERE / "bylength.csv", columns, by_length)
    text_runs.measured(runs, HERE / "results.csv", JOINED, joined)


if __name__ == "__main__":
    main()
