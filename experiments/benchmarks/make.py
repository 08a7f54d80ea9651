# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and figure.png, from the CSV files beside this file and nothing else.

python experiments/benchmarks/make.py
"""

import csv
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent


def read(name):
    """Rows of a CSV file; none if nothing was measured yet."""
    if not (HERE / name).exists():
        return []
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))


def cpu():
    lines = [
        "| work | times as fast | quartiles | goal | ours | theirs |",
        "|---|---|---|---|---|---|",
    ]
    for row in read("cpu.csv"):
        lines.append(
            f"| {row['name']} | **{float(row['ratio_median']):.2f}** "
            f"| {float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f} | {row['goal']} "
            f"| {1e3 * float(row['our_seconds']):,.0f} ms "
            f"| {1e3 * float(row['their_seconds']):,.0f} ms |"
        )
    return lines


def tpu():
    """Tuned over plain, for every pair of rows."""
    lines = [
        "| step | cycles | bytes | temporary | plain: cycles | plain: GB | plain: GiB temporary |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {(row["row"], row["formulation"]): row for row in read("tpu.csv")}
    for name in dict.fromkeys(name for name, _ in rows):
        if (name, "plain") not in rows or (name, "tuned") not in rows:
            continue
        ours, plain = rows[name, "tuned"], rows[name, "plain"]
        ratio = {k: float(ours[k]) / float(plain[k]) for k in ("cycles", "bytes", "temporary")}
        lines.append(
            f"| {plain['config']}, {plain['batch_per_chip']} a chip, {plain['topology']} "
            f"| **{ratio['cycles']:.2f}** | **{ratio['bytes']:.2f}** "
            f"| **{ratio['temporary']:.2f}** "
            f"| {float(plain['cycles']) / 1e6:,.0f} M | {float(plain['bytes']) / 1e9:,.1f} "
            f"| {float(plain['temporary']) / 2**30:,.2f} |"
        )
    return lines


def inputs():
    lines = ["| images | CPU ms, ours | tf.data | ratio | goal |", "|---|---|---|---|---|"]
    for row in read("input.csv"):
        theirs = f"{float(row['their_ms']):.2f}" if row.get("their_ms") else ""
        ratio = f"{float(row['ratio_median']):.2f}" if row.get("ratio_median") else ""
        goal = f"at most {row['goal']}" + ("" if ratio else " ms")
        lines.append(
            f"| {row['name']} | {float(row['our_ms']):.4g} | {theirs} | {ratio} | {goal} |"
        )
    return lines


def startup():
    lines = ["| start | seconds | quartiles | goal |", "|---|---|---|---|"]
    for row in read("startup.csv"):
        lines.append(
            f"| {row['name']} | {float(row['seconds_median']):.1f} "
            f"| {float(row['seconds_low']):.1f} to {float(row['seconds_high']):.1f} "
            f"| {row['goal']} |"
        )
    return lines


TABLES = {"cpu": cpu, "tpu": tpu, "input": inputs, "startup": startup}


def document(text):
    """README.md with every table between its marks made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n".join(table()) + "\n" + end + after
    return text


def draw():
    """How many times as fast, against the goal of each row."""
    rows = read("cpu.csv")[::-1]
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    ratios = [float(row["ratio_median"]) for row in rows]
    spread = [
        [r - float(row["ratio_low"]) for r, row in zip(ratios, rows, strict=True)],
        [float(row["ratio_high"]) - r for r, row in zip(ratios, rows, strict=True)],
    ]
    axes.barh(places, ratios, xerr=spread, color="#4c78a8")
    axes.plot([float(row["goal"]) for row in rows], places, "k|", markersize=18, label="goal")
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_xlabel("times as fast (CPU, medians of pairs, quartiles)")
    axes.legend(loc="lower right")
    FigureCanvasAgg(figure).print_png(str(HERE / "figure.png"))


def main():
    page = HERE / "README.md"
    page.write_text(document(page.read_text()))
    draw()


if __name__ == "__main__":
    main()
