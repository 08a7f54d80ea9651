# SPDX-License-Identifier: Apache-2.0
"""The CSV files here -> table.md, figure.png and the README's tables.

    python -m experiments.vision_comparison.make

results.csv and time_results.csv are of one setting; grid.csv, warmup.csv and final.csv are of the
protocol; speed.csv is of `measure.py`.
"""

import pathlib

from experiments import costs, protocol, study
from localglobal_jax.config import loading
from localglobal_jax.training.reporting import verdicts

HERE = pathlib.Path(__file__).parent
SWEEP = loading.import_file(HERE / "sweep.py")
MODELS = SWEEP.models_of(None)
PAIRS = [(n, "CoAtNet") for n in MODELS if n != "CoAtNet"]
TEST = "test/accuracy"
STEPS = str(SWEEP.get_config().steps)
PARTS = [part["data.train_split"] for part in SWEEP.parts(None)]


def beside(file):
    """Reads another CSV file of this study; empty if the file does not exist yet."""
    return study.read(HERE / file)


def reported():
    """Returns the rows of the reported runs, of equal steps and of equal time."""
    tuned = protocol.state(HERE) == protocol.TUNED
    return protocol.reported(HERE) + ([] if tuned else beside("time_results.csv"))


def of_model(rows, name):
    return [row for row in rows if protocol.model_of(row, MODELS) == name]


def split(rows):
    """{title: rows}: equal steps on 10 % and 100 %, equal time."""
    equal = [row for row in rows if row["steps"] == STEPS]
    timed = [row for row in rows if row["steps"] != STEPS]
    tenth, full = (study.where(equal, **{"data.train_split": part}) for part in PARTS)
    # CoAtNet's time is the measure: its runs of equal time are those of equal steps
    same = of_model(full, "CoAtNet") if timed else []
    parts = {"10 %, equal steps": tenth, "100 %, equal steps": full}
    return {**parts, "100 %, equal time": [*timed, *same]}


def columns(rows):
    """{title: {model: {seed: test accuracy in per cent}}}."""
    return {
        title: {
            n: {seed: 100 * v for seed, v in study.by_seed(of_model(part, n), TEST).items()}
            for n in MODELS
        }
        for title, part in split(rows).items()
    }


def compared(found):
    """Returns the verdicts on every model against CoAtNet."""
    all_of = {}
    for title, each in found.items():
        all_of |= study.compared(each, f"{title}, points", PAIRS)
    return all_of


def tables(rows):
    runs = reported()
    found, one = columns(runs), columns([*rows, *beside("time_results.csv")])
    few, many, _ = found.values()
    timed = split(runs)["100 %, equal time"]
    accuracy = []
    for n in MODELS:
        cells = [study.shown(list(each[n].values())) for each in found.values()]
        cells.append(next((row["steps"] for row in of_model(timed, n)), "not run"))
        accuracy.append([n, *cells, study.shown(verdicts.paired(many[n], few[n]))])
    settings = [(n, *study.setting(of_model(runs, n), protocol.IMAGES)) for n in MODELS]
    after = compared(found)
    sides = [{n: v.side for n, v in each.items()} for each in (compared(one), after)]
    body = [[n, *(study.shown(list(each[n].values())) for each in one.values())] for n in MODELS]
    return {
        "accuracy": study.table(
            ["model", *found, "steps of equal time", "100 % over 10 %"], accuracy
        ),
        "ranking": [f"- {title}: {study.ranked(each)}" for title, each in found.items()],
        "speed": costs.table(beside("speed.csv"), list(MODELS), "CoAtNet"),
        "verdict": study.sentences(after),
        "setting": study.table(("model", "learning rate", "warm-up"), settings),
        "grid": study.grid(HERE, MODELS, protocol.IMAGES, scale=100, digits=2),
        "one setting": study.table(["model", *one], body),
        "changed": study.changed(HERE, *sides),
    }


def draw(_):
    found = columns(reported())
    figure = study.figure(2)
    axes = figure.subplots(1, 2)
    means = []
    for j, (title, each) in enumerate(found.items()):
        for i, n in enumerate(MODELS):
            if each[n]:
                mean, half = study.point(list(each[n].values()))
                means.append(mean)
                axes[0].bar(
                    i + 0.27 * (j - 1), mean, 0.25, yerr=half, capsize=2, color=study.COLORS[j],
                    label=title if i == 0 else None,
                )  # fmt: skip
    axes[0].set_xticks(range(len(MODELS)), MODELS)
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
