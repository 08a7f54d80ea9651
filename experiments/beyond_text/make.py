# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.beyond_text.make

lengths.csv is of one setting; grid.csv, warmup.csv, final.csv and final_lengths.csv are of the
protocol.
"""

import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
MODELS = SWEEP.NAMES


def tuned():
    return protocol.state(HERE) == protocol.TUNED


def reported():
    """Returns the rows of the reported runs."""
    return study.read(HERE / ("final_lengths.csv" if tuned() else "lengths.csv"))


def scores(rows):
    """BLEU and loss on the whole test set, by the longest pairs that training saw."""
    rows = study.where(rows, tokens="all")
    lengths = sorted({row["max_length"] for row in rows}, key=int, reverse=True)
    cases = [(m, column) for m in lengths for column in ("bleu", "nll")]
    body = []
    for n in MODELS:
        cells = [
            study.shown(study.values(study.where(rows, model=n, max_length=m), column), 2)
            for m, column in cases
        ]
        body.append([n, *(cells or ["not run"])])
    names = {"bleu": "BLEU", "nll": "loss"}
    heads = [f"{names[column]}, trained up to {m}" for m, column in cases] or ["BLEU"]
    return study.table(["model", *heads], body)


def unseen(rows):
    """{tokens: {model: {seed: loss of the model trained on short pairs minus that on long}}}."""
    rows = [row for row in rows if row["tokens"] != "all"]
    trained = sorted({row["max_length"] for row in rows}, key=int)
    if len(trained) < 2:
        return {}

    def losses(n, tokens, length):
        return study.by_seed(study.where(rows, model=n, tokens=tokens, max_length=length), "nll")

    found, first = {}, 1
    for tokens in sorted({row["tokens"] for row in rows}, key=int):
        group = found[f"{first}-{tokens}"] = {}
        first = int(tokens) + 1
        for n in MODELS:
            short, long = losses(n, tokens, trained[0]), losses(n, tokens, trained[-1])
            group[n] = {seed: short[seed] - long[seed] for seed in short if seed in long}
    return found


def lengths(rows):
    found = unseen(rows)
    heads = [f"{tokens} tokens" for tokens in found] or ["length"]
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in MODELS]
    return study.table(["model", *heads], body if found else [[n, "not run"] for n in MODELS])


def settings():
    """Returns the table of the settings of the reported runs."""
    rows, models = protocol.reported(HERE), SWEEP.models_of(None)
    own = {n: [row for row in rows if protocol.model_of(row, models) == n] for n in MODELS}
    head = ("model", "norm", "learning rate", "warm-up")
    if not rows:
        one = SWEEP.get_config().optim
        cell = ("post-norm", f"{one.learning_rate:g}", str(one.warmup_steps))
        return study.table(head, [(n, *cell) for n in MODELS])
    body = [(n, *study.setting(found, protocol.TEXT)) for n, found in own.items()]
    return study.table(head, body)


def tables(_):
    after, before = compared(reported()), compared(study.read(HERE / "lengths.csv"))
    sides = [{name: each.side for name, each in found.items()} for found in (before, after)]
    return {
        "settings": settings(),
        "text": scores(reported()),
        "lengths": lengths(reported()),
        "verdict": [
            line
            for name, each in after.items()
            for line in study.sentences({name: each}, 2 if name.endswith("BLEU") else 3)
        ],
        "grid": study.grid(HERE, SWEEP.models_of(None), protocol.TEXT),
        "one setting": scores(study.read(HERE / "lengths.csv")),
        "changed": study.changed(HERE, *sides),
    }


def compared(rows):
    """Returns the verdicts: loss, BLEU, and loss on lengths that training did not see."""
    whole = study.where(rows, tokens="all")
    longest = max((row["max_length"] for row in whole), key=int, default="")
    own = {n: study.where(whole, model=n, max_length=longest) for n in MODELS}
    pairs = [(n, "MUSE") for n in MODELS if n != "MUSE"] + [("A", "relative"), ("E", "relative")]
    found = {}
    for name, column in (("loss", "nll"), ("BLEU", "bleu")):
        numbers = {n: study.by_seed(each, column) for n, each in own.items()}
        found |= study.compared(numbers, name, pairs, smaller_is_better=name == "loss")
    for tokens, each in list(unseen(rows).items())[-1:]:
        name = f"loss added at {tokens} tokens by training on short pairs"
        both = [(n, other) for n in MODELS[2:] for other in MODELS[:2]]
        found |= study.compared(each, name, both, smaller_is_better=True)
    return found


def draw(_):
    figure = study.figure()
    axes = figure.subplots()
    study.curves(axes, MODELS, unseen(reported()))
    axes.set_title("loss added by having trained on short pairs only", fontsize=10)
    axes.set_xlabel("tokens of the sentence")
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
