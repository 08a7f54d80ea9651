# SPDX-License-Identifier: Apache-2.0
"""Entropy of self-attention by length of the sentence -> results.csv, heatmaps.csv.

    python -m experiments.attention_dispersion.measure runs/results

Measures every finished Transformer, MUSE-simple and MUSE of muse_results on its test set. A row is
a layer, a head and a bucket of lengths: means over all its real positions. Continues where it
stopped.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import localglobal_jax as lg
from experiments import text_runs
from localglobal_jax.data.text import pipeline
from localglobal_jax.data.text.bucketing import Budget

HERE = pathlib.Path(__file__).parent
LENGTHS = (8, 16, 24, 32, 48, 64, 96)  # tokens, the end included: the last of each bucket
SHOWN = (14, 20)  # tokens of the sentence whose attention is drawn: at least, at most
COLUMNS = ("model", "seed", "part", "layer", "head", "tokens", "sentences")
COLUMNS += ("entropy", "normalised", "maximum", "effective")


@functools.partial(jax.jit, static_argnums=0)
def attention(module, variables, source, target):
    """{(part, layer): weights of its self-attention [b, heads, l, l]}."""
    with lg.implementation("fused"):  # as in training
        _, sown = module.apply(variables, source, target, train=False, mutable=["intermediates"])
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown["intermediates"]):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1] == "attention" and "cross" not in names:
            found[f"{names[0]} {names[1].removeprefix('layer')}"] = leaf
    return found


@functools.partial(jax.jit, static_argnames="causal")
def sharpness(weights, real, *, causal):
    """Returns means over the positions with several keys, by sentence and head: [b, heads].

    Entropy in nats; over its largest value, the logarithm of the number of visible positions; the
    largest weight; and the number of positions of a uniform distribution of this entropy.
    """
    entropy = -jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), -1)
    seen = (
        jnp.cumsum(real, 1) if causal else jnp.broadcast_to(real.sum(1, keepdims=True), real.shape)
    )
    counts = (real & (seen > 1))[:, None]
    normalised = entropy / jnp.log(jnp.maximum(seen, 2))[:, None]
    values = (entropy, normalised, weights.max(-1), jnp.exp(entropy))
    return [(v * counts).sum(-1) / jnp.maximum(counts.sum(-1), 1) for v in values]


def measure(trained):
    module, variables = trained.translator.module, trained.translator.variables
    source = trained.source(edges=LENGTHS)
    sums = {}
    for batch in pipeline.eval_batches(source, budget=Budget(8192, 8)):
        kept = batch["mask"].any(1) & (batch["source"].shape[1] <= max(LENGTHS))
        if not kept.any():
            continue
        sides = {"encoder": batch["source"], "decoder": batch["target_input"]}
        for key, weights in attention(module, variables, *map(jnp.asarray, sides.values())).items():
            part, layer = key.split()
            real = sides[part] != module.pad
            found = sharpness(weights, jnp.asarray(real), causal=part == "decoder")
            bucket = np.searchsorted(LENGTHS, real.sum(1))
            for b in np.unique(bucket[kept]):
                own = kept & (bucket == b)
                total = np.stack([np.asarray(values)[own].sum(0) for values in found])
                before = sums.get((part, layer, b), (0, 0.0))
                sums[part, layer, b] = before[0] + int(own.sum()), before[1] + total
    for (part, layer, b), (count, total) in sorted(sums.items()):
        for head, values in enumerate((total / count).T, 1):
            row = dict(zip(COLUMNS[7:], (f"{v:.5f}" for v in values), strict=True))
            row |= {"model": trained.model, "seed": trained.seed, "part": part, "layer": layer}
            yield row | {"head": head, "tokens": LENGTHS[b], "sentences": count}


def heat_maps(trained):
    """Returns the mean attention of the encoder's heads in the first fitting test sentence."""
    module, variables = trained.translator.module, trained.translator.variables
    source = trained.source()
    everything = source.batch(np.arange(len(source)), source.edges[-1])["source"]
    length = (everything != module.pad).sum(1)
    whole = [sentence.endswith(".") for sentence in source.text.sources]
    fits = (length >= SHOWN[0]) & (length <= SHOWN[1]) & whole
    index = np.flatnonzero(fits)[:1]
    batch = source.batch(index, int(source.lengths[index[0]]))
    tokens = batch["source"][0][: length[index[0]]]
    pieces = trained.translator.tokenizers.source.pieces(tokens)
    found = attention(module, variables, batch["source"], batch["target_input"])
    for key, weights in found.items():
        part, layer = key.split()
        if part == "encoder":
            mean = np.asarray(weights[0].mean(0))[: len(tokens), : len(tokens)]
            for i, row in enumerate(mean):
                values = " ".join(f"{w:.3f}" for w in row)
                yield {
                    "model": trained.model,
                    "layer": layer,
                    "piece": pieces[i],
                    "weights": values,
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", help="the folder of muse_results' runs")
    runs = [r for r in text_runs.finished(parser.parse_args().runs) if r.model != "DynamicConv"]
    text_runs.measured(runs, HERE / "results.csv", COLUMNS, measure)
    first = [r for r in runs if r.seed == 0]
    columns = ("model", "layer", "piece", "weights")
    text_runs.measured(first, HERE / "heatmaps.csv", columns, heat_maps)


if __name__ == "__main__":
    main()
