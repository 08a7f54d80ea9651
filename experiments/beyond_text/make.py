# SPDX-License-Identifier: Apache-2.0
"""lengths.csv -> table.md, figure.png and the README's tables.

python -m experiments.beyond_text.make
"""

import pathlib

from experiments import study

HERE = pathlib.Path(__file__).parent
MODELS = ("Transformer", "MUSE", "relative", "A", "E")


def measured():
    return study.read(HERE / "lengths.csv")


def scores():
    """BLEU and loss on the whole test set, by the longest pairs that training saw."""
    rows = study.where(measured(), tokens="all")
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


def unseen():
    """{tokens: {model: {seed: loss of the model trained on short pairs minus that on long}}}."""
    rows = [row for row in measured() if row["tokens"] != "all"]
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


def lengths():
    found = unseen()
    heads = [f"{tokens} tokens" for tokens in found] or ["length"]
    body = [[n, *(study.shown(list(each[n].values())) for each in found.values())] for n in MODELS]
    return study.table(["model", *heads], body if found else [[n, "not run"] for n in MODELS])


def tables(_):
    return {"text": scores(), "lengths": lengths(), "verdict": verdict_lines()}


def verdict_lines():
    """Returns the verdicts of the translations: loss, BLEU, and loss on unseen lengths."""
    rows = study.where(measured(), tokens="all")
    longest = max((row["max_length"] for row in rows), key=int, default="")
    own = {n: study.where(rows, model=n, max_length=longest) for n in MODELS}
    pairs = [(n, "MUSE") for n in MODELS if n != "MUSE"] + [("A", "relative"), ("E", "relative")]
    lower = {"digits": 3, "smaller_is_better": True}
    lines = []
    for name, column, options in (("loss", "nll", lower), ("BLEU", "bleu", {})):
        scores = {n: study.by_seed(found, column) for n, found in own.items()}
        lines += study.verdict_lines(scores, name, pairs, **options)
    for tokens, each in list(unseen().items())[-1:]:
        name = f"loss added at {tokens} tokens by training on short pairs"
        both = [(n, other) for n in MODELS[2:] for other in MODELS[:2]]
        lines += study.verdict_lines(each, name, both, **lower)
    return lines


def draw(_):
    figure = study.figure()
    axes = figure.subplots()
    study.curves(axes, MODELS, unseen())
    axes.set_title("loss added by having trained on short pairs only", fontsize=10)
    axes.set_xlabel("tokens of the sentence")
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
