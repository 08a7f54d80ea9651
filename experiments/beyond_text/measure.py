# SPDX-License-Identifier: Apache-2.0
"""Measures the runs of `sweep.py` on sentences longer than those of training.

    python -m experiments.beyond_text.measure runs/beyond_text        # of `sweep`: lengths.csv
    python -m experiments.beyond_text.measure runs/final final        # final_lengths.csv

A row is a run and a bucket of lengths of the test set (tokens of the longer side, the end included;
"all" is the whole set): loss per target token, and BLEU and chrF of greedy translations. Continues
where it was stopped.
"""

import pathlib
import sys

import numpy as np

from experiments import text_runs
from localglobal_jax.inference import bleu

HERE = pathlib.Path(__file__).parent
LENGTHS = (16, 24, 32, 48, 64, 96)  # the last of each bucket
LONGEST = max(LENGTHS)  # beyond it, the test set has a few sentences of up to 300 tokens
COLUMNS = ("model", "seed", "max_length", "tokens", "sentences", "nll", "bleu", "chrf")


def measure(trained):
    source = trained.source(edges=LENGTHS)
    sums = np.zeros((len(source), 2))
    for batch, loss in text_runs.token_losses(trained, source):
        kept = batch["mask"].any(1)
        both = ((loss * batch["mask"]).sum(1), batch["mask"].sum(1))
        sums[batch["index"][kept]] = np.stack(both, 1)[kept]
    bucket = np.searchsorted(LENGTHS, source.lengths)
    chosen = np.flatnonzero(source.lengths <= LONGEST)
    lines = [source.text.sources[i] for i in chosen]
    said = dict(zip(chosen, trained.translator.translate(lines, beam=1), strict=True))
    for b in (*range(len(LENGTHS)), None):
        index = chosen if b is None else np.flatnonzero(bucket == b)
        loss, tokens = sums[index].sum(0)
        found = bleu.score([said[i].text for i in index], [source.text.targets[i] for i in index])
        yield {
            "model": trained.model,
            "seed": trained.seed,
            "max_length": trained.run.data.max_length,
            "tokens": "all" if b is None else LENGTHS[b],
            "sentences": len(index),
            "nll": f"{loss / tokens:.6f}",
            "bleu": f"{found['bleu']:.4f}",
            "chrf": f"{found['chrf']:.4f}",
        }


if __name__ == "__main__":
    file = HERE / "_".join((*sys.argv[2:3], "lengths.csv"))
    text_runs.measured(text_runs.finished(sys.argv[1]), file, COLUMNS, measure)
