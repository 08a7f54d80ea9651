# SPDX-License-Identifier: Apache-2.0
"""``localglobal evaluate``: metrics of a saved checkpoint."""

import argparse
import json

# ---------------------------------------------------------------------------- commands


def evaluate(args: argparse.Namespace) -> None:
    from localglobal_jax.training import evaluation

    step, results = evaluation.evaluate(args.workdir, args.step, args.overrides, args.average)
    if args.json:
        print(json.dumps({"step": step, **results}))
        return
    for split, metrics in results.items():
        shown = "  ".join(f"{k} {v:.{5 if v % 1 else 99}g}" for k, v in metrics.items())
        print(f"step {step}  {split}  {shown}")
