# SPDX-License-Identifier: Apache-2.0
"""Draws the CSVs of `measure.py` and muse_results -> table.md, figure.png, the README's tables.

python -m experiments.bleu_by_length.make
"""

import pathlib
from functools import partial

from experiments import protocol, study
from experiments.text_runs import MODELS, model_name
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
BUCKETS = ("1-15", "16-30", "31-45", "46-60", "61-75", "76-90", "91-105", "over_105")
SHOWN = BUCKETS[:4]  # beyond, our test set has 19 sentences or fewer in each
KS = ("1", "2", "4", "8")
PAIRS = [(model, "Transformer") for model in MODELS[1:]] + [("MUSE", "DynamicConv")]


def trained():
    """{model: rows of muse_results}."""
    rows = protocol.reported(HERE.parent / "muse_results")
    named = [(model_name(r["model.layout"], r["model.blocks.M.windows"]), r) for r in rows]
    return {model: [row for name, row in named if name == model] for model in MODELS}


def excess(rows, model, k, column):
    """{seed: loss of k sentences as one input, over the same sentences one by one}."""
    those = [r for r in rows if (r["model"], r["k"]) == (model, k)]
    return {r["seed"]: float(r[column]) - float(r[f"{column}_alone"]) for r in those}


def kept(rows, model, k):
    """{seed: BLEU of k sentences as one input, in per cent of that one by one}."""
    those = [r for r in rows if (r["model"], r["k"]) == (model, k)]
    return {r["seed"]: 100 * float(r["bleu"]) / float(r["bleu_alone"]) for r in those}


def official():
    found = study.read(HERE / "official.csv")
    return study.table(
        ("source words", "sentences", "BLEU"),
        [(r["words"], f"{int(r['sentences']):,}", f"{float(r['bleu']):.2f}") for r in found],
    )


def ours():
    head = ("model", "all", *SHOWN)
    columns = ("test/bleu", *(f"test/bleu_{bucket}" for bucket in SHOWN))
    return study.table(
        head,
        [(m, *(study.shown(study.values(r, c)) for c in columns)) for m, r in trained().items()],
    )


def joined(rows):
    head = ("model, sentences", "tokens", "loss more than alone", "than the Transformer's")
    head += (
        "of the first sentence",
        "than the Transformer's",
        "BLEU kept, %",
        "than the Transformer's",
    )
    body = []
    for model in MODELS:
        for k in KS[1:]:
            those = [r for r in rows if (r["model"], r["k"]) == (model, k)]
            tokens = study.values(those, "source_tokens")
            cells = [f"{model}, {k}", f"{tokens[0]:.0f}" if tokens else "not run"]
            for measure, digits in (
                (partial(excess, column="inner"), 3),
                (partial(excess, column="first"), 3),
                (kept, 1),
            ):
                own = measure(rows, model, k)
                more = verdicts.paired(own, measure(rows, "Transformer", k))
                cells.append(study.shown(list(own.values()), digits))
                cells.append("" if model == "Transformer" else study.shown(more, digits))
            body.append(cells)
    return study.table(head, body)


def tables(rows):
    lines, sides = [], {}
    for digits, found in compared(rows):
        lines += study.sentences(found, digits)
        sides |= {name: verdict.side for name, verdict in found.items()}
    return {
        "official": official(),
        "ours": ours(),
        "joined": joined(rows),
        "verdict": lines,
        "changed": study.changed(HERE, study.earlier(HERE), sides),
    }


def compared(rows):
    """Yields digits and verdicts: loss and BLEU of joined sentences, and loss of natural ones."""
    natural = study.read(HERE / "bylength.csv")
    for name, measure, digits in (
        ("loss added by eight in one input", partial(excess, rows, k="8", column="inner"), 3),
        ("the same, first sentence", partial(excess, rows, k="8", column="first"), 3),
        ("BLEU kept of two in one input, points", partial(kept, rows, k="2"), 1),
        ("BLEU kept of eight in one input, points", partial(kept, rows, k="8"), 1),
        ("loss of 65 to 96 tokens less that of 9 to 16", partial(growth, natural), 3),
    ):
        scores = {model: measure(model=model) for model in MODELS}
        yield digits, study.compared(scores, name, PAIRS, smaller_is_better=digits == 3)


def growth(rows, model):
    """{seed: loss of natural sentences of 65 to 96 tokens, over that of 9 to 16}."""
    by_length = {
        n: study.by_seed([r for r in rows if (r["model"], r["source_tokens"]) == (model, n)], "nll")
        for n in ("16", "96")
    }
    return {seed: loss - by_length["16"][seed] for seed, loss in by_length["96"].items()}


def line(axes, xs, groups, color, label):
    """Plots means with their intervals over the seeds; missing runs are left out."""
    points = [(x, *study.point(numbers)) for x, numbers in zip(xs, groups, strict=True) if numbers]
    if points:
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, error, color=color, label=label, marker="o", ms=3, capsize=2, lw=1)


def draw(rows):
    figure = study.figure(2, 2)
    (left, right), (alone, natural) = figure.subplots(2, 2)
    found = study.read(HERE / "official.csv")
    for axes, places in ((left, range(8)), (right, range(4))):
        names = [bucket.replace("over_", ">") for bucket in BUCKETS]
        axes.set(xticks=list(places), ylabel="BLEU", xlabel="words of the source")
        axes.set_xticklabels([names[i] for i in places], fontsize=7)
    left.bar(range(8), [float(r["bleu"]) for r in found[1:]], color=study.COLORS[0])
    left.set_title("MUSE's published hypotheses, IWSLT14", fontsize=9)
    right.set_title("ours, LibreOffice Help", fontsize=9)
    alone.set(xlabel="short sentences in one input", ylabel="loss more than alone, nats")
    alone.set_title("same content, only the length changes", fontsize=9)
    natural.set(xlabel="tokens of the source (mean of the bucket's ends)", ylabel="loss, nats")
    natural.set_title("sentences as they are", fontsize=9)
    lengths = study.read(HERE / "bylength.csv")
    ends = sorted({int(r["source_tokens"]) for r in lengths})[:-1]
    middle = [(a + b) / 2 for a, b in zip([0, *ends], ends, strict=False)]
    for color, (model, those) in zip(study.COLORS, trained().items(), strict=False):
        line(right, range(4), [study.values(those, f"test/bleu_{b}") for b in SHOWN], color, model)
        more = [list(excess(rows, model, k, "inner").values()) for k in KS]
        line(alone, [int(k) for k in KS], more, color, model)
        own = [r for r in lengths if r["model"] == model]
        groups = [
            study.values([r for r in own if int(r["source_tokens"]) == e], "nll") for e in ends
        ]
        line(natural, middle, groups, color, model)
    for axes in (left, right, alone, natural):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
