# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal convert`: converts published weights to a checkpoint of this package."""

import argparse
import json

from localglobal_jax.cli import options

NAME = "convert"
HELP = "published weights to a checkpoint of this package"
EXAMPLE = "timm coatnet_0_rw_224.safetensors --out runs/coatnet_0_rw"
NOTES = """\
How the images of the weights are prepared (size, mean, std, crop, interpolation) is stored with
them, from their name or from the config.json of the hub beside the file. --config.data.mean=...
(std, image_size, eval_crop, interpolation) is for weights that were trained otherwise."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, NOTES)
    options.take_overrides(parser)
    parser.add_argument("source", choices=("timm", "focal", "fairseq"))
    parser.add_argument("weights", metavar="FILE",
                     help="a .safetensors file, a .pt file of fairseq, or a hub name")  # fmt: skip
    parser.add_argument("--name", help="timm's name of the model (default: that of the file)")
    parser.add_argument("--args", metavar="JSON", default="{}",
                     help="of the original model: an object, @FILE or FILE.json")  # fmt: skip
    parser.add_argument("--dict", nargs="+", default=(), metavar="DICT",
                     help="dict.txt of fairseq: one for both languages, or two")  # fmt: skip
    parser.add_argument("--labels", metavar="FILE",
                     help="names of the classes, one a line, in their order")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR")


def run(args: argparse.Namespace) -> None:
    """Converts, and prints a report."""
    from localglobal_jax.convert import files

    arguments = files.read_arguments(args.args)
    report = files.convert_file(
        args.source, args.weights, args.out,
        name=args.name, arguments=arguments, dictionaries=args.dict, overrides=args.overrides,
        labels=args.labels,
    )  # fmt: skip
    print(json.dumps(report) if args.json else "\n".join(f"{k}: {v}" for k, v in report.items()))
