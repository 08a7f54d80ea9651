# SPDX-License-Identifier: Apache-2.0
"""Formats reports as text. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.profiling.roofline import NOT_VALIDATED, totals

ROWS = 12
COLUMN = 30  # characters


def size(n: float | None) -> str:
    """Returns a size as ``3.82 GiB``."""
    if n is None:
        return "?"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def number(x: float, form: str = ",.2f") -> str:
    """Formats a number by `form`, or with two digits where that would leave fewer than two."""
    decimals = int(re.findall(r"\d", form)[0])
    return f"{x:.2g}" if 0 < abs(x) < 10 ** (1 - decimals) else f"{x:{form}}"


def amount(x: float, unit: str, form: str = ",.2f") -> str:
    """Returns an amount of FLOP or B as ``476.4 GFLOP``; less than a tenth of 1 G as M or k."""
    for prefix, scale in (("G", 1e9), ("M", 1e6)):
        if abs(x) >= scale / 10 or not x:
            return f"{number(x / scale, form)} {prefix}{unit}"
    return f"{number(x / 1e3, form)} k{unit}"


def sent(x: float) -> str:
    """Returns bytes as ``18.89 MB``, or as kB if they are less than a tenth of 1 MB."""
    return f"{number(x / 1e6)} MB" if x >= 1e5 else f"{number(x / 1e3)} kB"


def between(low: float | None, high: float | None, form: str, unit: str = "") -> str:
    """Returns a range as ``12 to 34 ms``; a missing end as ``at least`` or ``at most``."""
    if high is None or low is None:
        known = low if high is None else high
        side = "at least" if high is None else "at most"
        return f"{side} {number(known, form)}{unit}" if known is not None else "?"
    return f"{number(low, form)} to {number(high, form)}{unit}"


def verdict(report: Mapping[str, Any]) -> str:
    """Returns whether a program fits, and by how much."""
    found = report["memory"]
    needed, usable = found["needed"], found["usable"]
    if report["fits"] is None:
        return f"needs {size(needed)} a device (placeholder CPU devices have no limit)"
    if needed is None:
        return f"DOES NOT FIT: needs more than the {size(usable)} of a device"
    share = f"{size(needed)} of {size(usable)} a device"
    if report["fits"]:
        return f"fits: needs {share}, {size(usable - needed)} to spare"
    return f"DOES NOT FIT: needs {share}, {size(needed - usable)} too much"


def text(report: Mapping[str, Any]) -> str:
    """Returns the whole report as text."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    lines = [
        f"{report['config']}  {report['step']} step on {report['topology']}",
        f"{report['chips']} chips, {report['devices']} devices: {mesh}; {_strategy(report)}",
        f"batch: {report['batch']}; {report['parameters']:,} parameters",
        "",
        verdict(report),
        *_memory(report["memory"]),
        "",
        f"compute   {amount(report['flops'], 'FLOP', ',.1f')} a device (ours, loops counted)",
    ]
    if "bytes_accessed" in report:
        lines.append(f"memory    {amount(report['bytes_accessed'], 'B')} read and written")
        lines.append(f"network   {number(report['wire_bytes'] / 1e6, ',.1f')} MB sent")
        if "network_bytes" in report:
            lines[-1] += f", at least {number(report['network_bytes'] / 1e6, ',.1f')} MB of it "
            lines[-1] += "between hosts"
    if report.get("loops_of_unknown_length"):
        lines.append(f"{report['loops_of_unknown_length']} loops of unknown length counted once")
    if "step_ms" in report:
        lines += ["", *_times(report)]
    if "perfect_fusion" in report:
        lines += ["", *_perfect_fusion(report)]
    if "kernels" in report:
        lines += ["", *_kernels(report["kernels"])]
    if report["fits"] is False and report.get("arrays"):
        lines += ["", "the largest arrays of the attempt:", *_arrays(report["arrays"])]
    if "layers" in report:
        lines += ["", *_collectives(report["collectives"]), "", *_layers(report["layers"])]
        lines += ["", *[f"{x['level']}: {x['name']}: {x['text']}" for x in report["lints"]]]
    used = report["compile"]
    lines += ["", f"compiled in {used['cpu_seconds']:.0f} CPU-seconds, {size(used['peak_bytes'])}"]
    return "\n".join(lines)


def _strategy(report: Mapping[str, Any]) -> str:
    """Returns the strategy and the share of the parameters that it splits."""
    share = f"{100 * report['parameters_split']:.1f} % of the parameters"
    name = str(report["strategy"])
    return name if name == "replicate" else f"{name}, which splits {share}"


def _perfect_fusion(report: Mapping[str, Any]) -> list[str]:
    """Returns the work that no fusion saves, and how many times as much the program does."""
    found = report["perfect_fusion"]
    line = (
        f"perfect fusion: {amount(found['flops'], 'FLOP', ',.1f')}, {amount(found['bytes'], 'B')}"
    )
    if "bound_ms" in found:
        line += f": at least {number(found['bound_ms'])} ms"
    lines = [line]
    if "bytes_accessed" in report:
        flops, nbytes = report["flops"] / found["flops"], report["bytes_accessed"] / found["bytes"]
        lines.append(f"this program: {flops:.2f} times the FLOP and {nbytes:.1f} times the bytes")
        if "kernels" in report:
            lines[-1] += f"; its kernels' rooflines add up to {number(_rooflines(report))} ms"
    return lines


def _rooflines(report: Mapping[str, Any]) -> float:
    return sum(row["roofline_ms"] for row in report["kernels"])


def _memory(found: Mapping[str, Any]) -> list[str]:
    rows = [(name, n) for name, n in found["split"].items() if n]
    names = {"padding": "padding of these", "output": "results", "temporary": "activations"}
    for name in ("padding", "output", "temporary", "code"):
        if found.get(name, 0) > 0:
            rows.append((names.get(name, name), found[name]))
    return [f"  {name:<17} {size(n):>11}" for name, n in rows]


def _arrays(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{size(row['bytes']):>11}  {row['dtype']}{list(row['shape'])} {row['op']}  "
        f"{row['layer']} {row['pass']}".rstrip()
        for row in rows
    ]


def _times(report: Mapping[str, Any]) -> list[str]:
    ms, step = report["bounds_ms"], report["step_ms"]
    rate, mfu = report["items_per_second"], report["mfu"]
    known = "  ".join(f"{name} {number(n)} ms" for name, n in ms.items())
    percent = {k: None if v is None else 100 * v for k, v in mfu.items()}
    return [
        f"no step is faster than, by published peaks:  {known}",
        f"step      {between(step['low'], step['high'], '.1f', ' ms')} ({NOT_VALIDATED})",
        f"{report['items_name']}/s  {between(rate['low'], rate['high'], ',.0f')}",
        f"MFU       {between(percent['low'], percent['high'], '.1f', ' %')}",
    ]


def _kernels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{'kernels':<12} {'count':>6} {'GB':>8} {'GFLOP':>9} {'roofline':>10} {'estimate':>10}"
    ]
    names = ("count", "bytes", "flops", "roofline_ms", "estimated_ms")
    total = {"kind": "all", **{name: sum(row[name] for row in rows) for name in names}}
    for row in [*rows, total]:
        lines.append(
            f"{row['kind']:<12} {row['count']:>6} {number(row['bytes'] / 1e9):>8} "
            f"{number(row['flops'] / 1e9, ',.1f'):>9} {number(row['roofline_ms']):>7} ms "
            f"{number(row['estimated_ms']):>7} ms"
        )
    return lines


def _collectives(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["nothing is sent between devices"]
    head = f"{'sent':<19} {'type':<5} {'group':>5} {'count':>5} {'payload':>10} {'wire':>10}  layer"
    lines = [head]
    for row in rows[:ROWS]:
        lines.append(
            f"{row['op']:<19} {row['dtype']:<5} {row['group']:>5} {row['count']:>5} "
            f"{sent(row['payload']):>10} {sent(row['wire']):>10}  "
            f"{row['layer']} {row['pass']}".rstrip()
        )
    if len(rows) > ROWS:
        lines.append(f"... and {len(rows) - ROWS} more rows (--json has all); in all:")
    for row in totals(rows):
        lines.append(
            f"{row['op']:<19} {row['dtype']:<5} {row['group']:>5} {'':>5} "
            f"{sent(row['payload']):>10} {sent(row['wire']):>10}  all"
        )
    return lines


def _layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'time':>7} {'bytes':>7}  layer (shares; the time is the compiler's estimate)"]
    for row in rows[:ROWS]:
        cycles = "" if row["cycles_share"] is None else f"{100 * row['cycles_share']:.1f} %"
        share = f"{100 * row['bytes_share']:.1f} %"
        lines.append(f"{cycles:>7} {share:>7}  {row['layer']} {row['pass']}".rstrip())
    return lines


def beside(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns two reports side by side as text."""

    def row(name: str, *values: str) -> str:
        return f"{name:<22}" + "".join(f"{value:>{COLUMN}}" for value in values)

    def each(name: str, value: Any) -> str:
        return row(name, *[value(report) for report in reports])

    def bound(name: str) -> str:
        def shown(r: Mapping[str, Any]) -> str:
            return f"{number(r['bounds_ms'][name])} ms" if "bounds_ms" in r else "?"

        return each(name, shown)

    def fused(r: Mapping[str, Any]) -> str:
        found = r.get("perfect_fusion", {})
        return f"{number(found['bound_ms'])} ms" if "bound_ms" in found else "?"

    def bracket(field: str, form: str, unit: str = "", scale: float = 1) -> str:
        def shown(r: Mapping[str, Any]) -> str:
            found = {
                k: v * scale for k, v in r.get(field, {}).items() if isinstance(v, int | float)
            }
            return between(found.get("low"), found.get("high"), form, unit)

        return each({"step_ms": "step *", "mfu": "MFU *"}.get(field, "items/s *"), shown)

    lines = [
        *[row("", *parts) for parts in _heads([r["config"] for r in reports])],
        each("parameters", lambda r: f"{r['parameters']:,}"),
        each("batch", lambda r: f"{r['items']:,} {r['items_name']}"),
        each("fits", lambda r: {True: "yes", False: "NO", None: "?"}[r["fits"]]),
        each("needed", lambda r: size(r["memory"]["needed"])),
        *[
            each(name, lambda r, name=name: size(r["memory"]["split"].get(name)))
            for name in ("parameters", "optimizer", "batch")
        ],
        each("activations", lambda r: size(r["memory"].get("temporary"))),
        each("code", lambda r: size(r["memory"].get("code"))),
        each("parameters split", lambda r: f"{100 * r['parameters_split']:.1f} %"),
        each("FLOP", lambda r: amount(r["flops"], "FLOP", ",.1f")),
        each("bytes", lambda r: amount(r["bytes_accessed"], "B") if "wire_bytes" in r else "?"),
        each("sent", lambda r: amount(r["wire_bytes"], "B") if "wire_bytes" in r else "?"),
        *[bound(name) for name in {n: 0 for r in reports for n in r.get("bounds_ms", ())}],
        each("perfect fusion", fused),
        bracket("step_ms", ".1f", " ms"),
        bracket("items_per_second", ",.0f"),
        bracket("mfu", ".1f", " %", 100),
        each("errors", lambda r: str(sum(x["level"] == "error" for x in r.get("lints", [])))),
        each("compile", lambda r: f"{r['compile']['cpu_seconds']:.0f} CPU-s"),
        f"* {NOT_VALIDATED}. All but the batch and the parameters: of one device.",
    ]
    return "\n".join(lines)


def _heads(names: Sequence[str]) -> list[list[str]]:
    """Breaks names into lines of one column each, after a path's or an option's part."""
    columns = []
    for name in names:
        lines = [""]
        for part in re.findall(r".[^/:,.=_ ]*[/:,.=_ ]?", name):
            for piece in (part[i : i + COLUMN - 1] for i in range(0, len(part), COLUMN - 1)):
                if len(lines[-1] + piece) >= COLUMN:
                    lines.append("")
                lines[-1] += piece
        columns.append(lines)
    most = max(map(len, columns))
    return [[lines[i] if i < len(lines) else "" for lines in columns] for i in range(most)]
