# SPDX-License-Identifier: Apache-2.0
"""The runs of `run.sh` -> results.csv, by_length.png, and a table on stdout.

python experiments/lohelp/make.py runs/lohelp     (without the folder: from results.csv)
"""

import csv
import json
import pathlib
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = pathlib.Path(__file__).parent
BUCKETS = ("1-15", "16-30", "31-45", "46-60")  # 2,252 of 2,285; beyond, each has 19 or fewer
NAMES = {"muse": "MUSE", "transformer": "Transformer"}
COLUMNS = ("bleu", "chrf", "perplexity", *(f"bleu_{bucket}" for bucket in BUCKETS))


def collect(runs: pathlib.Path) -> None:
    """Writes results.csv: the output of `localglobal evaluate` for the test split of every run."""
    rows = []
    for file in sorted(runs.glob("*_*.test.json")):
        model, seed = file.name.removesuffix(".test.json").split("_")
        found = json.loads(file.read_text())
        values = {name: f"{found['test'][name]:.4f}" for name in COLUMNS if name in found["test"]}
        rows.append({"model": model, "seed": seed, "step": found["step"], **values})
    with open(HERE / "results.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, ("model", "seed", "step", *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def main() -> None:
    if len(sys.argv) > 1:
        collect(pathlib.Path(sys.argv[1]))
    with open(HERE / "results.csv") as file:
        rows = list(csv.DictReader(file))
    by_model = {m: [row for row in rows if row["model"] == m] for m in NAMES}
    if not all(by_model.values()):
        sys.exit(f"there are no runs of one of {', '.join(NAMES)}: run experiments/lohelp/run.sh")
    print("| | " + " | ".join(f"{NAMES[m]} ({len(by_model[m])} seeds)" for m in NAMES) + " |")
    print("|---|---|---|")
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name in COLUMNS:
        label = {"bleu": "BLEU", "chrf": "chrF"}.get(name, name.replace("bleu_", "BLEU, words "))
        print(f"| {label} | " + " | ".join(mean(by_model[m], name) for m in NAMES) + " |")
    for offset, (model, found) in zip((-0.2, 0.2), by_model.items(), strict=True):
        means = [statistics.mean(float(r[f"bleu_{b}"]) for r in found) for b in BUCKETS]
        axes.bar([i + offset for i in range(len(BUCKETS))], means, 0.4, label=NAMES[model])
    axes.set(xticks=range(len(BUCKETS)), xticklabels=BUCKETS)
    axes.set(xlabel="words of the source", ylabel="BLEU, mean of the seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "by_length.png", dpi=150)


if __name__ == "__main__":
    main()
