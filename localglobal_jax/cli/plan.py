# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal plan`: compiles a step for TPUs or GPUs without one.

Imports no jax: the compiler has its own process.
"""

import argparse
import json
import sys
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.config import loading, schema
from localglobal_jax.profiling import compiler_process, roofline, search, table, topologies

NAME = "plan"
HELP = "compile for TPUs or GPUs without one: does it fit? how fast at most?"
EXAMPLE = "--config configs/coatnet_imagenet.py --topology v5e-256"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_config(parser)
    add = parser.add_argument
    add("--topology", required=True, metavar="SLICE",
        help="v5e:16x16, v5p:8x8x8, a cloud name (v5e-256), h100-8, h100:8x8 (hosts x GPUs); "
        "cpu:8 needs no compiler of its own")  # fmt: skip
    options.add_part(parser)
    add("--batch_search", action="store_true", help="find the largest batch that fits")
    options.add_compare(parser, "side by side")
    add("--timeout", type=float, default=1800, metavar="SECONDS",
        help="limit of one compilation; default: 1800")  # fmt: skip
    add("--no_cache", action="store_true",
        help="compile again, although ~/.cache/localglobal/plan has it")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prints the report of one config, or of two side by side."""
    topology = topologies.parse(args.topology)
    given = loading.load_runs(args.config, args.overrides, args.compare, args.compare_overrides)
    if args.batch_search and len(given) > 1:
        raise ValueError("give --batch_search or --compare, not both")
    if args.batch_search and topology.chip is None:
        raise ValueError("--batch_search needs devices with a limit, e.g. --topology v5e:4x4")
    runs = list(given.values())
    if args.batch_search:
        trials: list[dict[str, Any]] = []
        runs = [searched(runs[0], args, topology, trials)]
    reports = [
        {"config": name, **measured(run, args, topology)}
        for name, run in zip(given, runs, strict=True)
    ]
    if args.batch_search:
        reports[0] |= {"batch_size": runs[0].batch_size, "trials": trials}
    if args.json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
        return
    if args.batch_search:
        print(f"the largest batch_size that fits: {runs[0].batch_size}\n")
    print(table.text(reports[0]) if len(reports) == 1 else table.beside(reports))


def measured(
    run: schema.Run, args: argparse.Namespace, topology: topologies.Topology
) -> dict[str, Any]:
    """Returns the report of one run."""
    facts, text = compiler_process.measure(
        run, topology, args.step, timeout=args.timeout, cache=not args.no_cache
    )
    about = {"step": args.step, "strategy": run.parallel.strategy}
    about["versions"] = {name: compiler_process.version(name) for name in compiler_process.PACKAGES}
    return {**about, **roofline.build(facts, text, topology)}


def searched(
    run: schema.Run,
    args: argparse.Namespace,
    topology: topologies.Topology,
    trials: list[dict[str, Any]],
) -> schema.Run:
    """Returns the run with the largest batch that fits; appends every compilation to `trials`."""

    def fits(batch_size: int) -> bool:
        tried = measured(with_batch(run, batch_size), args, topology)
        trials.append({"batch_size": batch_size, "needed": tried["memory"]["needed"]})
        trials[-1]["fits"] = tried["fits"]
        print(f"batch_size={batch_size}: {table.verdict(tried)}", file=sys.stderr, flush=True)
        return bool(tried["fits"])

    best = search.largest(fits, run.batch_size, unit(run, topology.devices))
    if not best:
        raise ValueError(
            f"not even batch_size={trials[-1]['batch_size']} fits {topology.name}: take more "
            "devices, or split the parameters (parallel.strategy=fsdp)"
        )
    return with_batch(run, best)


def with_batch(run: schema.Run, batch_size: int) -> schema.Run:
    """Returns the run with that batch size, in training and in evaluation."""
    evaluation = run.eval.model_copy(update={"batch_size": None})
    return run.model_copy(update={"batch_size": batch_size, "eval": evaluation})


def unit(run: schema.Run, devices: int) -> int:
    """Returns the smallest step between batch sizes that divide over `devices`."""
    if isinstance(run.data, schema.Text):
        longest = -(-run.data.max_length // 8) * 8
        return run.data.rows_multiple * longest
    model = run.parallel.mesh.get("model", 1)
    return devices // max(model, 1) * run.optim.accumulate
