# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal models`: lists named models and their sizes beside the papers'."""

import argparse
import json
from typing import Any

NAME = "models"
HELP = "named models: sizes beside the papers'"
EXAMPLE = "coatnet_0 volo_d1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")


def run(args: argparse.Namespace) -> None:
    """Prints a table, or a list as JSON."""
    from localglobal_jax.config import validation
    from localglobal_jax.models import flops, registry

    rows: list[dict[str, Any]] = []
    traced: dict[Any, Any] = {}
    for name in args.names or registry.named_models():
        if name not in registry.MODELS:
            raise validation.unknown("model", name, registry.MODELS)
        parameters, multiply_adds, _ = registry.FIGURES.get(name, (None, None, None))
        inputs = registry.example(name)
        sizes, tokens = [x.shape[1] for x in inputs], inputs[0].ndim == 2
        counted = flops.model_cost(registry.create_model(name), *inputs, traced=traced)
        rows.append(
            {
                "name": name,
                "image_size": None if tokens else sizes[0],
                "lengths": sizes if tokens else None,
                "parameters": counted.parameters,
                "multiply_adds": counted.multiply_adds,
                "paper_parameters": parameters,
                "paper_multiply_adds": multiply_adds,
            }
        )
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':<22} {'size':>5} {'parameters':>14} {'paper':>8} {'GFLOPs':>8} {'paper':>7}")
    for row in rows:
        paper_m = f"{row['paper_parameters'] / 1e6:.4g} M" if row["paper_parameters"] else ""
        paper_g = f"{row['paper_multiply_adds'] / 1e9:.1f}" if row["paper_multiply_adds"] else ""
        size = row["image_size"] or "+".join(map(str, row["lengths"]))
        print(
            f"{row['name']:<22} {size:>5} {row['parameters']:>14,} {paper_m:>8} "
            f"{row['multiply_adds'] / 1e9:>8.2f} {paper_g:>7}"
        )
    print("GFLOPs are multiply-adds of one image, or of one sentence and its translation at the")
    print("given numbers of tokens; counted from shapes, nothing is allocated.")
