# SPDX-License-Identifier: Apache-2.0
"""Table and figure from the two CSV files: python -m experiments.coatnet_transfer.make"""

import pathlib

from experiments import study
from localglobal_jax.training.reporting import verdicts

LAYOUTS = ("CCTT", "CTTT")
PAPER = {"CCTT": "82.39", "CTTT": "81.78"}
PRETRAINED = pathlib.Path(__file__).parent / "pretrain.csv"
RATE = "optim.learning_rate"
DIGITS = {  # which runs of the second stage
    "fine-tuned": lambda row: row["init"] and not row[RATE],
    "fine-tuned at 2e-3": lambda row: row["init"] and row[RATE],
    "from nothing at 2e-3": lambda row: not row["init"],
}
TEST, TUNED = "test/accuracy", "train[30%:]+test/accuracy"


def columns(rows):
    """{title: {layout: {seed: accuracy in per cent}}}."""
    before = study.read(PRETRAINED) if PRETRAINED.exists() else []

    def of(found, column):
        return {
            n: {
                seed: 100 * value
                for seed, value in study.by_seed(
                    [row for row in found if row["model.layout"] == n], column
                ).items()
            }
            for n in LAYOUTS
        }

    return {
        "Fashion-MNIST, before": of(before, TEST),
        **{
            f"digits, {title}": of([row for row in rows if chosen(row)], TUNED)
            for title, chosen in DIGITS.items()
        },
    }


def tables(rows):
    found = columns(rows)
    body = [
        [n, PAPER[n], *(study.shown(list(each[n].values())) for each in found.values())]
        for n in LAYOUTS
    ]
    a, b = LAYOUTS
    differences = [study.shown(verdicts.paired(each[a], each[b])) for each in found.values()]
    body.append([f"{a} - {b}", "0.61", *differences])
    head = ["", "the paper: JFT-300M, then ImageNet-1k", *found]
    lines = [
        line
        for title, each in found.items()
        for line in study.verdict_lines(each, f"{title}, points")
    ]
    trained, alone = (
        found[f"digits, {title}"] for title in ("fine-tuned at 2e-3", "from nothing at 2e-3")
    )
    for n in LAYOUTS:
        scores = {f"{n} pre-trained": trained[n], f"{n} from nothing": alone[n]}
        lines += study.verdict_lines(scores, "digits at 2e-3, points")
    return {"transfer": study.table(head, body), "verdict": lines}


def draw(rows):
    found = columns(rows)
    figure = study.figure(width=8)
    ax = figure.subplots()
    for i, n in enumerate(LAYOUTS):
        for j, each in enumerate(found.values()):
            if not each[n]:
                continue
            mean, half = study.point(list(each[n].values()))
            label = n if j == 0 else None
            ax.bar(
                j + 0.4 * i - 0.2, mean, 0.38, yerr=half, capsize=3, color=study.COLORS[i],
                label=label,
            )  # fmt: skip
    ax.set_xticks(range(len(found)), [title.replace(" at ", "\nat ") for title in found])
    ax.set_ylabel("accuracy, %")
    if ax.patches:
        ax.set_ylim(bottom=max(0, min(bar.get_height() for bar in ax.patches) - 5))  # a cut axis
        ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
