# SPDX-License-Identifier: Apache-2.0
"""results.csv -> table.md, figure.png and the README's tables and answers.

python -m experiments.length_or_difficulty.make
"""

from experiments import study
from localglobal_jax.training.reporting import verdicts

MODELS = (
    "attention, absolute",
    "attention, relative",
    "attention, none",
    "convolution, absolute",
    "convolution, none",
    "both, absolute",
    "both, none",
)
# The comparisons between models that the protocol of this study names
PAIRS = (
    ("attention, relative", "attention, absolute"),
    ("attention, none", "attention, absolute"),
    ("convolution, none", "convolution, absolute"),
    ("both, none", "both, absolute"),
    ("convolution, absolute", "attention, absolute"),
    ("both, absolute", "attention, absolute"),
    ("both, absolute", "convolution, absolute"),
)


def costs(rows, bucket):
    """{model: ({seed: cost of length alone}, {seed: growth of natural sentences})}, in nats."""
    found = {}
    for model in MODELS:
        operator, positions = model.split(", ")
        own = [
            r
            for r in rows
            if (r["operator"], r["positions"], r["bucket"]) == (operator, positions, bucket)
        ]
        length = {r["seed"]: float(r["joined"]) - float(r["alone"]) for r in own}
        growth = {r["seed"]: float(r["natural"]) - float(r["short"]) for r in own}
        found[model] = length, growth
    return found


def answer(length, growth):
    """Returns the answer of the protocol for one model, from {seed: number} of both costs.

    "no growth": natural long sentences are not separated from short ones. "length": length alone
    costs more than half of the growth, "difficulty": less than half; "undecided": the interval of
    the difference holds 0.
    """
    half = {seed: number / 2 for seed, number in growth.items()}
    found = verdicts.verdict(length, half)
    if found.n < 2:
        return f"no answer ({found.n} seeds)"
    if verdicts.verdict(growth, dict.fromkeys(growth, 0.0)).side != "better":
        return "no growth"
    return {"better": "length", "worse": "difficulty"}.get(found.side, found.side)


def buckets(rows):
    return sorted({row["bucket"] for row in rows}, key=lambda text: int(text.split("-")[0]))


def tables(rows):
    body, lines = [], []
    for bucket in buckets(rows):
        found = costs(rows, bucket)
        for model, (length, growth) in found.items():
            both = (study.shown(list(each.values()), 3) for each in (growth, length))
            body.append([bucket, model, *both, answer(length, growth)])
        lengths = {model: length for model, (length, _) in found.items()}
        measure = f"cost of length alone at {bucket} tokens"
        lines += study.verdict_lines(lengths, measure, PAIRS, digits=3, smaller_is_better=True)
    head = ("source tokens", "operator, positions", "growth", "length alone", "answer")
    empty = [["not run", "", "", "", ""]]
    return {"verdict": study.table(head, body or empty), "verdict between models": lines}


def draw(rows):
    """Plots both costs of every model at the longest bucket."""
    figure = study.figure(width=8)
    axes = figure.subplots()
    last = buckets(rows)[-1:]
    for place, both in enumerate(costs(rows, last[0]).values() if last else ()):
        for color, offset, label, found in zip(
            study.COLORS, (-0.2, 0.2), ("growth", "length alone"), reversed(both), strict=False
        ):
            if found:
                mean, half = study.point(list(found.values()))
                known = axes.get_legend_handles_labels()[1]
                options = {"color": color, "label": None if label in known else label}
                axes.bar(place + offset, mean, 0.4, yerr=half, capsize=2, **options)
    axes.set_xticks(range(len(MODELS)), [name.replace(", ", "\n") for name in MODELS], fontsize=7)
    axes.set_ylabel("loss, nats a token")
    if axes.patches:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
