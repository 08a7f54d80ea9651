# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal evaluate`: computes the metrics of a saved checkpoint."""

import argparse
import json

from localglobal_jax.cli import options

NAME = "evaluate"
HELP = "evaluate a checkpoint"
EXAMPLE = "--workdir runs/digits"
NOTES = """\
--config.data.FIELD=VALUE evaluates on other data (name, dir, eval_splits) or at another image_size,
for which position tables are resized. The classes of other data are matched by their names; they
may be some of the checkpoint's, in any order. --config FILE takes the data of a config instead of
that of the run, prepared as for the checkpoint: a converted checkpoint needs it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, NOTES)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="of a run, or of a converted checkpoint"
    )
    options.add_config(parser, required=False)
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints one line per split."""
    from localglobal_jax.checkpoints import workdir

    workdir.check_exists(args.workdir, workdir.without_checkpoint)
    from localglobal_jax.training import evaluation

    step, results = evaluation.evaluate(
        args.workdir, args.step, args.overrides, args.average, args.config
    )
    if args.json:
        print(json.dumps({"step": step, **results}))
        return
    for split, metrics in results.items():
        shown = "  ".join(f"{k} {v:.{5 if v % 1 else 99}g}" for k, v in metrics.items())
        print(f"step {step}  {split}  {shown}")
