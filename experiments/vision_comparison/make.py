# SPDX-License-Identifier: Apache-2.0
"""Tables and figure from the CSV files here: python -m experiments.vision_comparison.make"""

import pathlib

from experiments import study
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
NAMES = {
    ("coatnet", "CCCC"): "MBConv",
    ("volo", "S"): "ViT",
    ("coatnet", "CCTT"): "CoAtNet",
    ("volo", "OSSS"): "VOLO",
    ("focal", "FF"): "Focal",
}
PAIRS = [(n, "CoAtNet") for n in NAMES.values() if n != "CoAtNet"]
TEST = "test/accuracy"


def beside(file):
    """Reads another CSV file of this study; empty if the file does not exist yet."""
    return study.read(HERE / file)


def accuracies(rows, name):
    """{seed: test accuracy of a model's runs, in per cent}."""
    own = [row for row in rows if NAMES[row["model.name"], row["model.layout"]] == name]
    return {seed: 100 * value for seed, value in study.by_seed(own, TEST).items()}


def columns(rows):
    """{title: {model: {seed: accuracy}}}: equal steps on 10 % and 100 %, equal time."""
    tenth = [row for row in rows if row["data.train_split"] == "train[:10%]"]
    full = [row for row in rows if row["data.train_split"] == "train"]
    timed = beside("time_results.csv")
    # CoAtNet's time is the measure: its runs of equal time are those of equal steps
    same = [row for row in full if timed and row["model.layout"] == "CCTT"]
    parts = {"10 %, equal steps": tenth, "100 %, equal steps": full}
    parts["100 %, equal time"] = [*timed, *same]
    return {title: {n: accuracies(p, n) for n in NAMES.values()} for title, p in parts.items()}


def tables(rows):
    found = columns(rows)
    steps = {
        NAMES[row["model.name"], row["model.layout"]]: row["steps"]
        for row in [*rows, *beside("time_results.csv")]
    }
    accuracy = []
    for n in NAMES.values():
        cells = [study.shown(list(each[n].values())) for each in found.values()]
        cells.append(steps[n] if beside("time_results.csv") else "not run")
        few, many, _ = found.values()
        accuracy.append([n, *cells, study.shown(verdicts.paired(many[n], few[n]))])
    measured = {row["model"]: row for row in beside("speed.csv")}
    speed = [[n, *figures(measured[n])] for n in NAMES.values() if n in measured]
    head = ["model", "parameters", "multiply-adds", "images/s", "times CoAtNet's", "state", "work"]
    return {
        "accuracy": study.table(
            ["model", *found, "steps of equal time", "100 % over 10 %"], accuracy
        ),
        "ranking": [f"- {title}: {study.ranked(each)}" for title, each in found.items()],
        "speed": study.table(head, speed or [["not run"] * len(head)]),
        "verdict": [
            line
            for title, each in found.items()
            for line in study.verdict_lines(each, f"{title}, points", PAIRS)
        ],
    }


def figures(row):
    """Cells of the speed table."""
    return [
        f"{int(row['parameters']):,}",
        f"{int(row['multiply_adds']) / 1e6:.1f} M",
        f"{float(row['images_per_second']):.0f}",
        f"{float(row['times_as_fast']):.2f} ({row['low']} to {row['high']})",
        f"{int(row['state_bytes']) / 2**20:.1f} MiB",
        f"{int(row['temporary_bytes']) / 2**20:.1f} MiB",
    ]


def draw(rows):
    found = columns(rows)
    figure = study.figure(2)
    axes = figure.subplots(1, 2)
    means = []
    for j, (title, each) in enumerate(found.items()):
        for i, n in enumerate(NAMES.values()):
            if each[n]:
                mean, half = study.point(list(each[n].values()))
                means.append(mean)
                axes[0].bar(
                    i + 0.27 * (j - 1), mean, 0.25, yerr=half, capsize=2, color=study.COLORS[j],
                    label=title if i == 0 else None,
                )  # fmt: skip
    axes[0].set_xticks(range(len(NAMES)), NAMES.values())
    axes[0].set_title("test accuracy, %", fontsize=10)
    if means:
        axes[0].set_ylim(min(means) - 3, max(means) + 4)  # a cut axis
        axes[0].legend(frameon=False, fontsize=7, loc="upper center", ncols=3)
    full = found["100 %, equal steps"]
    for i, row in enumerate(beside("speed.csv")):
        if scores := full[row["model"]]:
            mean, half = study.point(list(scores.values()))
            speed = float(row["images_per_second"])
            axes[1].errorbar(
                speed, mean, half, fmt="o", capsize=2, color=study.COLORS[i], label=row["model"]
            )
    axes[1].set_title("test accuracy, %, after equal steps", fontsize=10)
    axes[1].set_xlabel("training images/s, one core")
    if axes[1].containers:
        axes[1].legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(__file__, tables, draw)
