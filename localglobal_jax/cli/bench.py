# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal bench`: measures the speed of a step on this machine."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.config import loading

NAME = "bench"
HELP = "how fast is this machine? two configs in turns"
EXAMPLE = "--config configs/coatnet_digits.py --compare.dtype=bfloat16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_config(parser)
    options.add_compare(parser, "measured in turns with the first")
    options.add_part(parser)
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps to measure; default: 20"
    )
    parser.add_argument(
        "--input",
        action="store_true",
        help="the input of training alone: items/s and MB/s, and what they are bound by. "
        "--compare.data.workers=N: with N processes",
    )


def run(args: argparse.Namespace) -> None:
    """Measures one config or two, and prints the report."""
    # checked first: importing jax takes seconds
    given = loading.load_runs(args.config, args.overrides, args.compare, args.compare_overrides)

    if args.input:
        if args.step != "train":
            raise ValueError(
                f"--input measures the input of training: leave --step {args.step} out"
            )
        from localglobal_jax.profiling import bench_input

        inputs = [
            {"config": name, **bench_input.measure(run, args.steps)} for name, run in given.items()
        ]
        if args.json:
            print(json.dumps(inputs[0] if len(inputs) == 1 else inputs))
        else:
            print("\n\n".join(input_text(report) for report in inputs))
        return

    from localglobal_jax.profiling import bench, bench_input

    for run in given.values():
        bench_input.refuse_upload(run)
    measured = bench.measure(list(given.values()), step=args.step, steps=args.steps)
    found = [{"config": name, **report} for name, report in zip(given, measured, strict=True)]
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else found))
    else:
        print("\n\n".join(text(report) for report in found))


def text(report: Mapping[str, Any]) -> str:
    """Returns a report as text."""
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


def input_text(report: Mapping[str, Any]) -> str:
    """Returns a report of the input as text."""
    stages = ", ".join(f"{name} {us:,.1f}" for name, us in report["us_per_item"].items())
    each = " each" if report["workers"] else ""
    images = report["items"] == "images"
    hint = ": data.in_memory=false reads every record again" if images else ""
    return "\n".join(
        [
            f"{report['config']}  input alone",
            f"host     {report['workers']} workers, {report['threads']} threads{each}, "
            f"{report['cores']} cores, load {report['load']:.1f}",
            f"first    {report['first_batch_seconds']:.1f} s",
            f"rate     {report['items_per_second']:,.0f} {report['items']}/s; MB/s "
            f"{report['read_mb_per_second']:,.1f} read, {report['mb_per_second']:,.1f} made",
            *(
                [f"data     in memory, read before the first batch and not in the rate{hint}"]
                if report["in_memory"]
                else []
            ),
            f"one item: {stages} microseconds of one thread",
            f"bound by {report['bottleneck']}; the rate is {report['share_of_cores']:.0%} of all "
            "cores at one thread's speed",
        ]
    )
