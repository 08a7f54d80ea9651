# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal evaluate`: computes the metrics of a saved checkpoint."""

import argparse
import json

from localglobal_jax.cli import options

NAME = "evaluate"
HELP = "evaluate a checkpoint"
EXAMPLE = "--workdir runs/digits"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.take_overrides(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints one line per split."""
    from localglobal_jax.training import evaluation

    step, results = evaluation.evaluate(args.workdir, args.step, args.overrides, args.average)
    if args.json:
        print(json.dumps({"step": step, **results}))
        return
    for split, metrics in results.items():
        shown = "  ".join(f"{k} {v:.{5 if v % 1 else 99}g}" for k, v in metrics.items())
        print(f"step {step}  {split}  {shown}")
