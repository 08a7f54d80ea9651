# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.coatnet_transfer.make

pretrain.csv is of the first stage. Of the second, results.csv is of one setting, and grid.csv,
warmup.csv and final.csv are of the protocol.
"""

import pathlib

from experiments import protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
MODELS = SWEEP.models_of(None)
LAYOUTS = ("CCTT", "CTTT")
PAPER = {"CCTT": "82.39", "CTTT": "81.78"}
RATE = "optim.learning_rate"
ONE_SETTING = {  # runs of results.csv
    "fine-tuned at 5e-4": lambda row: row["init"] and not row[RATE],
    "fine-tuned at 2e-3": lambda row: row["init"] and row[RATE],
    "from nothing at 2e-3": lambda row: not row["init"],
}
CHOSEN = {  # runs of final.csv
    "fine-tuned": lambda row: row["init"],
    "from nothing": lambda row: not row["init"],
}
TEST, DIGITS = "test/accuracy", "train[30%:]+test/accuracy"


def percent(rows, column):
    """{layout: {seed: accuracy in per cent}}."""
    found = {n: study.by_seed(study.where(rows, **{"model.layout": n}), column) for n in LAYOUTS}
    return {n: {seed: 100 * v for seed, v in own.items()} for n, own in found.items()}


def columns(rows, kinds):
    """{title: {layout: {seed: accuracy in per cent}}} of the first stage and of kinds of runs."""
    reported = [str(seed) for seed in protocol.SEEDS]
    before = [row for row in study.read(HERE / "pretrain.csv") if row["seed"] in reported]
    return {
        "Fashion-MNIST, before": percent(before, TEST),
        **{
            f"digits, {title}": percent([row for row in rows if of_kind(row)], DIGITS)
            for title, of_kind in kinds.items()
        },
    }


def compared(found, at=""):
    """Returns the verdicts on the layouts in every column, and on pre-training.

    Args:
      at: end of the titles of the columns that have and have no pre-training.
    """
    every = {}
    for title, each in found.items():
        every |= study.compared(each, f"{title}, points")
    trained, alone = (found[f"digits, {title}{at}"] for title in CHOSEN)
    for n in LAYOUTS:
        scores = {f"{n} pre-trained": trained[n], f"{n} from nothing": alone[n]}
        every |= study.compared(scores, f"digits{at}, points")
    return every


def shown():
    """Returns the columns of the reported runs, and the verdicts on them."""
    rows = protocol.reported(HERE)
    if protocol.state(HERE) == protocol.TUNED:
        found = columns(rows, CHOSEN)
        return found, compared(found)
    found = columns(rows, ONE_SETTING)
    return found, compared(found, " at 2e-3")


def transfer(found):
    """Returns the table of a line for each layout, and their difference."""
    body = [
        [n, PAPER[n], *(study.shown(list(each[n].values())) for each in found.values())]
        for n in LAYOUTS
    ]
    a, b = LAYOUTS
    differences = [study.shown(verdicts.paired(each[a], each[b])) for each in found.values()]
    body.append([f"{a} - {b}", "0.61", *differences])
    return study.table(["", "the paper: JFT-300M, then ImageNet-1k", *found], body)


def settings():
    """Returns the table of the chosen settings."""
    rows = study.read(HERE / "final.csv") if protocol.state(HERE) == protocol.TUNED else []
    body = []
    for n in MODELS:
        own = [row for row in rows if protocol.model_of(row, MODELS) == n]
        body.append((n, *study.setting(own, SWEEP.KIND)))
    return study.table(("layout", "learning rate", "warm-up"), body)


def tables(rows):
    found, after = shown()
    one = columns(rows, ONE_SETTING)
    before = compared(one, " at 2e-3").items()
    return {
        "transfer": transfer(found),
        "verdict": study.sentences(after),
        "setting": settings(),
        "grid": study.grid(HERE, MODELS, SWEEP.KIND, scale=100, digits=2),
        "one setting": transfer(one),
        "changed": study.changed(
            HERE,
            {name.replace(" at 2e-3", ""): each.side for name, each in before},
            {name: each.side for name, each in after.items()},
        ),
    }


def draw(_):
    found, _ = shown()
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
