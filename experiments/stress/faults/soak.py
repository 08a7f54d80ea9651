# SPDX-License-Identifier: Apache-2.0
"""Watches an hour of real training from outside: memory, open files, threads, time per step.

    python experiments/stress/faults/soak.py images --out soak_images --hours 1

Reads ``/proc``, so Linux only. The run checkpoints and evaluates hundreds of times, because these
leaked. Time per step is CPU time and wall time: other work on the machine changes only the
latter. Ends the run by SIGTERM and writes OUT.csv, OUT.json, OUT.png.
"""

import argparse
import csv
import json
import pathlib
import signal
import subprocess
import time

import numpy as np
import runs

OVERRIDES = {
    "images": {"checkpoint.every": "200", "eval.every": "200", "log.every": "20"},
    "text": {"checkpoint.every": "200", "eval.every": "200", "log.every": "20"},
}
WARM_UP = 0.15  # of the time: compiling, filling of buffers and of the allocator's arenas
GROWTH = 0.02


def sample(pid, metrics):
    """One row of the table, or None where the process is gone."""
    process = pathlib.Path(f"/proc/{pid}")
    try:
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text().splitlines() if line
        )
        ticks = (process / "stat").read_text().rpartition(")")[2].split()
        files = len(list((process / "fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "VmRSS" not in status:  # a zombie
        return None
    return {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "anonymous_mib": int(status["RssAnon"].split()[0]) / 1024,
        "files": files,
        "threads": int(status["Threads"]),
        "cpu_seconds": (int(ticks[11]) + int(ticks[12])) / 100,
        "step": last_step(metrics),
    }


def last_step(metrics):
    """The last step that has a whole line."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def watch(kind, out, workdir, *, hours, every, data_dir):
    """Runs it; the table goes to the disk row by row."""
    arguments = runs.arguments(kind, workdir, steps="100000000", **OVERRIDES[kind])
    with open(f"{out}.log", "w") as log, open(f"{out}.csv", "w", newline="") as table:
        child = subprocess.Popen(
            runs.command(arguments), env=runs.environment(data_dir=data_dir), stdout=log, stderr=log
        )
        began, writer = time.monotonic(), None
        while time.monotonic() - began < hours * 3600:
            time.sleep(every)
            row = sample(child.pid, workdir / "metrics.jsonl")
            if row is None:
                break
            row = {"seconds": round(time.monotonic() - began, 1), **row}
            writer = writer or csv.DictWriter(table, row)
            if table.tell() == 0:
                writer.writeheader()
            writer.writerow({k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()})
            table.flush()
        child.send_signal(signal.SIGTERM)
        return child.wait()


def judge(table):
    """Returns a summary of the table, and whether it is flat."""
    with open(table, newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    seconds = columns["seconds"]
    warm = seconds > WARM_UP * seconds[-1]
    first = warm & (seconds < (WARM_UP + 0.15) * seconds[-1])
    last = seconds > 0.85 * seconds[-1]

    def per_step(name, where):
        spent, steps = columns[name][where], columns["step"][where]
        return (spent[-1] - spent[0]) / max(steps[-1] - steps[0], 1)

    found = {"hours": round(seconds[-1] / 3600, 3), "steps": int(columns["step"][-1])}
    for name in ("resident_mib", "anonymous_mib", "files", "threads"):
        # the median: a sample inside a save has that save's files and threads
        before, after = np.median(columns[name][first]), np.median(columns[name][last])
        found[name] = {
            "after_warm_up": round(float(before), 2),
            "at_the_end": round(float(after), 2),
            "growth": round(float(after / before - 1), 5),
        }
    for name in ("seconds", "cpu_seconds"):
        before, after = per_step(name, first), per_step(name, last)
        found[f"{name}_per_1000_steps"] = {
            "after_warm_up": round(1000 * before, 3),
            "at_the_end": round(1000 * after, 3),
            "growth": round(after / before - 1, 4),
        }
    # What slows down takes more of both clocks; either alone moves with the machine's other work.
    slower = min(found[f"{name}_per_1000_steps"]["growth"] for name in ("seconds", "cpu_seconds"))
    found["flat"] = bool(
        found["resident_mib"]["growth"] < GROWTH
        and found["files"]["growth"] < GROWTH
        and found["threads"]["growth"] < GROWTH
        and slower < 0.05
    )
    return found, columns, warm


def draw(columns, warm, out):
    """Four curves over the hours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    hours = columns["seconds"] / 3600
    lag = min(24, len(hours) // 4)  # two minutes: within seconds a step counts more or less
    spent, steps = (columns[n][lag:] - columns[n][:-lag] for n in ("cpu_seconds", "step"))
    pace = np.concatenate([np.full(lag, np.nan), 1000 * spent / np.maximum(steps, 1)])
    curves = {
        "resident memory, MiB": columns["resident_mib"],
        "open files": columns["files"],
        "threads": columns["threads"],
        "CPU seconds per 1,000 steps": pace,
    }
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        axes.plot(hours, values, linewidth=1)
        axes.axvspan(0, hours[~warm].max(initial=0), alpha=0.1)
        axes.set(xlabel="hours", ylabel=name, ylim=(0, 1.3 * np.nanmax(values[warm])))
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(f"{out}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=runs.RUNS)
    parser.add_argument("--out", required=True, help="stem of the files to write")
    parser.add_argument("--workdir", type=pathlib.Path, help="default: OUT.run")
    parser.add_argument("--data_dir", type=pathlib.Path)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two rows")
    parser.add_argument("--judge", action="store_true", help="only judge and draw what is there")
    args = parser.parse_args()
    code = None
    if not args.judge:
        workdir = args.workdir or pathlib.Path(f"{args.out}.run")
        code = watch(
            args.kind,
            args.out,
            workdir,
            hours=args.hours,
            every=args.every,
            data_dir=args.data_dir,
        )
    verdict, columns, warm = judge(f"{args.out}.csv")
    verdict = {"kind": args.kind, "exit": code, **verdict}
    draw(columns, warm, args.out)
    pathlib.Path(f"{args.out}.json").write_text(json.dumps(verdict, indent=2) + "\n")
    print(json.dumps(verdict))
    return 0 if verdict["flat"] and code in (None, 42) else 1


if __name__ == "__main__":
    raise SystemExit(main())
