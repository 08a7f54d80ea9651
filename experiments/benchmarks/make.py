# SPDX-License-Identifier: Apache-2.0
"""Makes the tables of README.md and figure.png from the CSV files beside this file.

python -m experiments.benchmarks.make
"""

import math
import pathlib

from experiments import study

HERE = pathlib.Path(__file__).parent
GIB = 2**30
PLANS = HERE.parent / "pod_plans/results.csv"
GOALS = {  # on one H100, over plain: of summed rooflines, of temporary memory
    "coatnet_0": (0.75, 0.65),
    "coatnet_2": (0.75, 0.65),
    "muse_wmt_en_de": (0.8, 0.8),
    **dict.fromkeys(("volo_d1", "focal_tiny", "CATT", "CETT"), (0.9, 0.9)),
}
FORM_MEASURES = (
    ("roofline_ms", 1, ".2f", "rooflines, ms"),
    ("estimated_ms", 1, ".2f", "XLA's estimates, ms"),
    ("temporary", GIB, ".2f", "temporary, GiB"),
)
FIRST = ("plain", "unrolled")  # what the other forms of a step are measured against


def read(name):
    return study.read(HERE / name)


def cpu(file="cpu.csv"):
    head = ["work", "times as fast", "quartiles", "goal", "ours", "theirs"]
    return study.table(
        head,
        (
            (row["name"], row["failed"], "", row["goal"], "", "")
            if row.get("failed")
            else (
                row["name"],
                f"**{float(row['ratio_median']):.2f}**",
                f"{float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f}",
                row["goal"],
                f"{1e3 * float(row['our_seconds']):,.0f} ms",
                f"{1e3 * float(row['their_seconds']):,.0f} ms",
            )
            for row in read(file)
        ),
    )


def gpu():
    return cpu("gpu.csv")


def tpu():
    """Tabulates every form over the first of its step."""
    measures = ("cycles", "bytes", "temporary", "compile_cpu_seconds")
    head = ["step", "form", "cycles", "bytes", "temporary", "CPU time of compiling"]
    body = []
    for rows in study.grouped(read("tpu.csv"), "row").values():
        if len(rows) < 2:
            continue
        first, *others = sorted(rows, key=lambda row: row["formulation"] not in FIRST)
        batch = f"{first['batch_per_chip']} a chip" if first["batch_per_chip"] else "its own batch"
        step = f"{first['config']}, {first['topology']}, {batch}"
        body.append((step, first["formulation"], *absolute(first)))
        for other in others:
            ratios = [ratio(other[k], first[k]) for k in measures]
            body.append(("", f"{other['formulation']} / {first['formulation']}", *ratios))
    return study.table(head, body)


def gpu_plans():
    """Tabulates the steps compiled for one H100: plain's numbers, tuned's ratios and the goals."""
    head = ["step", "form", "rooflines", "XLA's estimates", "temporary", "kernels", "goals"]
    body = []
    for rows in study.grouped(read("gpu_plans.csv"), "row").values():
        sides = {row["formulation"]: row for row in rows}
        plain, tuned = sides["plain"], sides["tuned"]
        name = plain["row"]
        body.append(
            (
                name,
                "plain",
                scaled(plain["roofline_ms"], 1, ".1f", "ms"),
                scaled(plain["estimated_ms"], 1, ".1f", "ms"),
                scaled(plain["temporary"], GIB, ".2f", "GiB"),
                f"{int(plain['kernels']):,}",
                "",
            )
        )
        measures = ("roofline_ms", "estimated_ms", "temporary", "kernels")
        goals = GOALS.get(name)
        goals = f"{goals[0]} of rooflines, {goals[1]} of temporary" if goals else ""
        body.append(
            ("", "tuned / plain", *(ratio(tuned[k], plain[k]) for k in measures), goals),
        )
    return study.table(head, body)


def gpu_forms():
    """Tabulates each formulation for GPUs over the reference implementation."""
    head = ["formulation", "module, with its gradient", "measure", "plain", "without", "with"]
    body = []
    for rows in study.grouped(read("gpu_forms.csv"), "row").values():
        sides = {row["formulation"]: row for row in rows}
        plain = sides["plain"]
        for i, (key, unit, form, measure) in enumerate(FORM_MEASURES):
            ratios = [ratio(sides[side][key], plain[key]) for side in ("without", "with")]
            first = (plain["row"], plain["module"]) if i == 0 else ("", "")
            body.append((*first, measure, scaled(plain[key], unit, form, ""), *ratios))
    return study.table(head, body)


def tpu_forms():
    """Tabulates each formulation of a block over the tuned one."""
    head = ["block, with its gradient", "formulation", "cycles", "bytes", "temporary"]
    body = []
    for rows in study.grouped(read("tpu_forms.csv"), "row").values():
        first, *others = sorted(rows, key=lambda row: row["formulation"] != "tuned")
        numbers = (
            scaled(first["cycles"], 1e6, ".1f", "M"),
            scaled(first["bytes"], 1e9, ".2f", "GB"),
            scaled(first["temporary"], GIB, ".2f", "GiB"),
        )
        body.append((f"{first['row']}, {first['module']}", first["formulation"], *numbers))
        for other in others:
            ratios = [ratio(other[k], first[k]) for k in ("cycles", "bytes", "temporary")]
            body.append(("", f"{other['formulation']} / tuned", *ratios))
    return study.table(head, body)


def largest():
    """Tabulates batches a chip, and whether they fit."""
    head = ["step", "images a chip", "form", "GiB needed", "fits"]
    body = [
        (
            f"{row['config']}, {row['topology']}",
            row["batch_per_chip"],
            row["formulation"],
            scaled(row["needed"], GIB, ".2f", ""),
            {"True": "yes", "False": "no"}[row["fits"]],
        )
        for row in read("tpu.csv")
        if "_b" in row["row"] and row["formulation"] not in ("unrolled", "scan")
    ]
    return study.table(head, body)


def absolute(row):
    return (
        scaled(row["cycles"], 1e6, ".0f", "M"),
        scaled(row["bytes"], 1e9, ".1f", "GB"),
        scaled(row["temporary"], GIB, ".2f", "GiB"),
        scaled(row["compile_cpu_seconds"], 1, ".0f", "s"),
    )


def scaled(value, unit, form, name):
    """Formats a cell; empty for a step that does not fit, which has few numbers."""
    return f"{float(value) / unit:,{form}} {name}" if value else ""


def ratio(value, first):
    return f"**{float(value) / float(first):.2f}**" if value and first else ""


def inputs():
    body = []
    for row in read("input.csv"):
        theirs = f"{float(row['their_ms']):.2f}" if row.get("their_ms") else ""
        ratio = f"{float(row['ratio_median']):.2f}" if row.get("ratio_median") else ""
        goal = f"at most {row['goal']}" + ("" if ratio else " ms")
        body.append((row["name"], f"{float(row['our_ms']):.4g}", theirs, ratio, goal))
    return study.table(["images", "CPU ms, ours", "tf.data", "ratio", "goal"], body)


def random_reads():
    body = [
        (
            row["name"],
            f"{int(row['tfrecord_per_s']):,}",
            f"{int(row['array_record_per_s']):,}",
            f"**{float(row['ratio_median']):.2f}**",
            f"{float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f}",
            f"{float(row['tfrecord_cpu_us']):,.0f}",
            f"{float(row['array_record_cpu_us']):,.0f}",
        )
        for row in read("random_reads.csv")
    ]
    head = ["records", "TFRecord, records/s", "ArrayRecord", "ratio", "quartiles"]
    return study.table([*head, "TFRecord, CPU µs a record", "ArrayRecord"], body)


def workers():
    body = [
        (
            row["workers"],
            row["threads"],
            row["images_per_second"],
            f"{row['lowest']} to {row['highest']}",
            f"{float(row['cpu_ms']):.2f}",
            f"{1e3 / float(row['cpu_ms']):.0f}",
            f"{float(row['main_ms']):.3f}",
        )
        for row in read("workers.csv")
    ]
    head = ["workers", "threads", "images/s", "lowest to highest", "CPU ms an image"]
    return study.table([*head, "images/s a core", "of it in the main process, ms"], body)


def hosts():
    """Tabulates the cores that the input of CoAtNet-0 takes: rate wanted times CPU time."""
    plans = {row["row"]: row for row in study.read(PLANS)}
    measured = max(read("workers.csv"), key=lambda row: int(row["workers"]))
    cpu_ms = float(measured["cpu_ms"])
    wanted = {
        "v5e-8": wanted_of_plan(plans["coatnet_0_replicate_v5e"], chips=256, of_host=8),
        "v5p-4": wanted_of_plan(plans["coatnet_0_replicate_v5p"], chips=512, of_host=4),
        "8 x H100": wanted_of_plan(plans["coatnet_0_8_H100"], chips=8, of_host=8),
    }
    body = [
        (
            name,
            " to ".join(f"{rate:,.0f}" for rate in rates),
            " to ".join(f"{math.ceil(rate * cpu_ms / 1e3)}" for rate in rates),
        )
        for name, rates in wanted.items()
    ]
    return study.table(["host", "images/s wanted", "cores for the input"], body)


def wanted_of_plan(row, *, chips, of_host):
    """Returns the two ends of the plan's estimate for the chips of a host."""
    ends = row["items/s, estimate"].replace(",", "").split(" to ")
    return [float(end) / chips * of_host for end in ends]


def startup():
    body = [
        (
            row["name"],
            f"{float(row['seconds_median']):.1f}",
            f"{float(row['seconds_low']):.1f} to {float(row['seconds_high']):.1f}",
            row["goal"],
            f"{row['programs']}, {row['programs_compiled_twice']} twice",
        )
        for row in read("startup.csv")
    ]
    return study.table(["start", "seconds", "quartiles", "goal", "programs compiled"], body)


def answers():
    body = [
        (row["name"], row["cpu_seconds"], row["seconds"], row["goal"])
        for row in read("answers.csv")
    ]
    return study.table(["command", "CPU seconds", "seconds", "goal"], body)


def tables():
    made = (
        cpu, gpu, gpu_plans, gpu_forms, tpu, tpu_forms, largest, inputs, workers, hosts,
        random_reads, startup, answers,
    )  # fmt: skip
    return {table.__name__: table() for table in made}


def draw():
    """Plots the ratio and the goal of each row."""
    rows = read("cpu.csv")[::-1]
    figure = study.figure(width=9, height=0.4 * len(rows) + 1)
    axes = figure.subplots()
    places = range(len(rows))
    ratios = [float(row["ratio_median"]) for row in rows]
    spread = [
        [r - float(row["ratio_low"]) for r, row in zip(ratios, rows, strict=True)],
        [float(row["ratio_high"]) - r for r, row in zip(ratios, rows, strict=True)],
    ]
    axes.barh(places, ratios, xerr=spread, color=study.COLORS[0])
    axes.plot([float(row["goal"]) for row in rows], places, "k|", markersize=18, label="goal")
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_xlabel("times as fast (CPU, medians of pairs, quartiles)")
    axes.legend(loc="lower right")
    return figure


def main():
    page = HERE / "README.md"
    page.write_text(study.document(page.read_text(), tables()))
    study.save(draw(), HERE / "figure.png")


if __name__ == "__main__":
    main()
