# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal export`: writes a trained model in a format that others read."""

import argparse
import json

from localglobal_jax.cli import options

NAME = "export"
HELP = "a trained model to safetensors, StableHLO or timm"
EXAMPLE = "runs/digits --format safetensors --out exported"
NOTES = """\
safetensors: the variables by path, config.json and a card: a folder for the Hugging Face hub, which
every --workdir and lg.load take too, also as hf://OWNER/NAME.
stablehlo: one program with its parameters, for CPU, CUDA and TPU and for batches of any size, which
jax runs without this package. Images are uint8 and normalised inside; --config.data.FIELD=VALUE is
as in `localglobal classify`. A model of text takes source and previous target tokens.
timm: a CoAtNet or VOLO under timm's names, which timm.create_model("local-dir:DIR",
pretrained=True) reads."""
FORMATS = ("safetensors", "stablehlo", "timm")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, NOTES)
    options.take_overrides(parser)
    parser.add_argument("workdir", metavar="WORKDIR", help="of a run, or of a converted checkpoint")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    """Exports, and prints a report."""
    from localglobal_jax.checkpoints import workdir

    workdir.check_local("--out", args.out, "folder")
    workdir.check_exists(args.workdir, workdir.without_checkpoint)
    from localglobal_jax.inference import export

    report = export.export(
        args.workdir, args.out, args.format,
        step=args.step, average=args.average, overrides=args.overrides,
    )  # fmt: skip
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['model']}, step {report['step']}, {report['parameters']:,} parameters")
    for name, size in report["written"].items():
        print(f"{args.out}/{name}  {size:,} bytes")
