# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal bench`: options and output. Imports no jax."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from localglobal_jax.config import loading


def add_options(sub: argparse.ArgumentParser) -> None:
    """All but ``--json``."""
    add = sub.add_argument
    add("--config", required=True, metavar="FILE[:ARG]",
        help="a config file; override fields with --config.a.b=VALUE")  # fmt: skip
    add("--compare", metavar="FILE[:ARG]", help="a second config, measured in turns with the "
        "first; its own overrides are --compare.a.b=VALUE, which alone are enough")  # fmt: skip
    add("--step", choices=("train", "eval", "decode"), default="train", help="default: train")
    add("--steps", type=int, default=20, metavar="N", help="to measure; default: 20")


def run(args: argparse.Namespace) -> None:
    """Prints what was measured."""
    # checked before jax takes seconds
    given = loading.load_runs(args.config, args.overrides, args.compare, args.compare_overrides)

    from localglobal_jax.profiling import bench

    measured = bench.measure(list(given.values()), step=args.step, steps=args.steps)
    found = [{"config": name, **report} for name, report in zip(given, measured, strict=True)]
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else found))
    else:
        print("\n\n".join(text(report) for report in found))


def text(report: Mapping[str, Any]) -> str:
    """A report for people."""
    ms, there = report["step_ms"], report["with_input"]
    lines = [
        f"{report['config']}  {report['step']} step",
        f"devices  {report['devices']}, load {report['load']:.1f}",
        f"compile  {report['compile_seconds']:.1f} s",
        f"step     {ms['median']:,.1f} ms (quartiles {ms['low']:,.1f} to {ms['high']:,.1f}), "
        f"{report['batch']:,} {report['items']}",
        f"rate     {report['items_per_second']:,.0f} {report['items']}/s; with input "
        f"{there['items_per_second']:,.0f}, input wait {there['input_wait']:.1%}",
    ]
    if report["flops_per_device"]:
        mfu = f", MFU {report['mfu']:.1%}" if report["mfu"] else ""
        lines.append(f"compute  {report['flops_per_device'] / 1e9:,.1f} GFLOP/s a device{mfu}")
    if "times_as_fast_as_first" in report:
        ratio = report["times_as_fast_as_first"]
        lines.append(
            f"{ratio['median']:.2f} times as fast as the first "
            f"(quartiles {ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    return "\n".join(lines)
