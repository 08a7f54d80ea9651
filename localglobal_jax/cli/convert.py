# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal convert`: other people's weights to a checkpoint of ours."""

import argparse
import json


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of the command line."""
    sub.add_argument("source", choices=("timm", "focal", "fairseq"))
    sub.add_argument("weights", metavar="FILE",
                     help="a .safetensors file, a .pt file of fairseq, or a hub name")  # fmt: skip
    sub.add_argument("--name", help="timm's name of the model (default: that of the file)")
    sub.add_argument("--args", metavar="JSON", default="{}",
                     help="of the original model: an object, @FILE or FILE.json")  # fmt: skip
    sub.add_argument("--dict", nargs="+", default=(), metavar="DICT",
                     help="dict.txt of fairseq: one for both languages, or two")  # fmt: skip
    sub.add_argument("--out", required=True, metavar="DIR")


def run(args: argparse.Namespace) -> None:
    """Converts, and says what it made."""
    from localglobal_jax.convert import files

    arguments = files.read_arguments(args.args)
    report = files.convert_file(
        args.source, args.weights, args.out,
        name=args.name, arguments=arguments, dictionaries=args.dict,
    )  # fmt: skip
    print(json.dumps(report) if args.json else "\n".join(f"{k}: {v}" for k, v in report.items()))
