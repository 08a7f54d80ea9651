# SPDX-License-Identifier: Apache-2.0
"""Formats reports as text. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.profiling.roofline import NOT_VALIDATED, totals

ROWS = 12


def size(n: float | None) -> str:
    """Returns a size as ``3.82 GiB``."""
    if n is None:
        return "?"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def between(low: float | None, high: float | None, form: str, unit: str = "") -> str:
    """Returns a range as ``12 to 34 ms``; a missing end as ``at least`` or ``at most``."""
    if high is None or low is None:
        known = low if high is None else high
        side = "at least" if high is None else "at most"
        return f"{side} {known:{form}}{unit}" if known is not None else "?"
    return f"{low:{form}} to {high:{form}}{unit}"


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
        f"{report['chips']} chips, {report['devices']} devices: {mesh}; {report['strategy']}",
        f"batch: {report['batch']}; {report['parameters']:,} parameters",
        "",
        verdict(report),
        *_memory(report["memory"]),
        "",
        f"compute   {report['flops'] / 1e9:,.1f} GFLOP a device (ours, loops counted)",
    ]
    if "bytes_accessed" in report:
        lines.append(f"memory    {report['bytes_accessed'] / 1e9:,.2f} GB read and written")
        lines.append(f"network   {report['wire_bytes'] / 1e6:,.1f} MB sent")
        if "network_bytes" in report:
            between_hosts = f"{report['network_bytes'] / 1e6:,.1f} MB of it between hosts"
            lines[-1] += f", at least {between_hosts}"
    if report.get("loops_of_unknown_length"):
        lines.append(f"{report['loops_of_unknown_length']} loops of unknown length counted once")
    if "step_ms" in report:
        lines += ["", *_times(report)]
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
    known = "  ".join(f"{name} {n:.2f} ms" for name, n in ms.items())
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
            f"{row['kind']:<12} {row['count']:>6} {row['bytes'] / 1e9:>8,.2f} "
            f"{row['flops'] / 1e9:>9,.1f} {row['roofline_ms']:>7.2f} ms "
            f"{row['estimated_ms']:>7.2f} ms"
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
            f"{row['payload'] / 1e6:>7,.2f} MB {row['wire'] / 1e6:>7,.2f} MB  "
            f"{row['layer']} {row['pass']}".rstrip()
        )
    if len(rows) > ROWS:
        lines.append(f"... and {len(rows) - ROWS} more rows (--json has all); in all:")
    for row in totals(rows):
        lines.append(
            f"{row['op']:<19} {row['dtype']:<5} {row['group']:>5} {'':>5} "
            f"{row['payload'] / 1e6:>7,.2f} MB {row['wire'] / 1e6:>7,.2f} MB  all"
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
        return f"{name:<22}" + "".join(f"{value:>30}" for value in values)

    def each(name: str, value: Any) -> str:
        return row(name, *[value(report) for report in reports])

    def bound(name: str) -> str:
        return each(name, lambda r: f"{r['bounds_ms'][name]:.2f} ms" if "bounds_ms" in r else "?")

    def bracket(field: str, form: str, unit: str = "", scale: float = 1) -> str:
        def shown(r: Mapping[str, Any]) -> str:
            found = {
                k: v * scale for k, v in r.get(field, {}).items() if isinstance(v, int | float)
            }
            return between(found.get("low"), found.get("high"), form, unit)

        return each({"step_ms": "step *", "mfu": "MFU *"}.get(field, "items/s *"), shown)

    lines = [
        each("", lambda r: r["config"].rpartition("/")[2][-29:]),
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
        each("FLOP", lambda r: f"{r['flops'] / 1e9:,.1f} G"),
        each("sent", lambda r: f"{r['wire_bytes'] / 1e6:,.1f} MB" if "wire_bytes" in r else "?"),
        *[bound(name) for name in {n: 0 for r in reports for n in r.get("bounds_ms", ())}],
        bracket("step_ms", ".1f", " ms"),
        bracket("items_per_second", ",.0f"),
        bracket("mfu", ".1f", " %", 100),
        each("errors", lambda r: str(sum(x["level"] == "error" for x in r.get("lints", [])))),
        each("compile", lambda r: f"{r['compile']['cpu_seconds']:.0f} CPU-s"),
        f"* {NOT_VALIDATED}. All but the batch and the parameters: of one device.",
    ]
    return "\n".join(lines)
