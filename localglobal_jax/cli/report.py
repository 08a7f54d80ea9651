# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal report`: writes a page (HTML) of one run, several, or a sweep."""

import argparse
import json
import pathlib
from typing import Any

from localglobal_jax.cli import options

NAME = "report"
HELP = "a page (HTML) of one run, of several side by side, or of a sweep"
EXAMPLE = "runs/digits runs/digits_2 --out report.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR",
        help="workdir of a run; several are compared; or the root of a sweep",
    )
    parser.add_argument("--out", default="report.html", metavar="FILE.html",
                     help="the page, one file without scripts; default: %(default)s")  # fmt: skip
    options.add_step(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    from localglobal_jax.checkpoints import workdir

    workdir.check_local("--out", args.out, "file")
    for path in args.workdirs:
        workdir.check_exists(path, workdir.without_config)
    from localglobal_jax.training.reporting.html import gather

    out = pathlib.Path(args.out)
    runs = gather.write(args.workdirs, out, args.step)
    if args.json:
        print(json.dumps({"file": str(out), "runs": [_described(found) for found in runs]}))
        return
    for found in runs:
        print(f"{found.name}: {found.state}")
    print(f"wrote {out}, {out.stat().st_size:,} bytes")


def _described(found: Any) -> dict[str, Any]:
    """Returns a run of the page as a JSON object, without curves and pictures."""
    confusion = found.confusion and {
        "split": found.confusion.split,
        "classes": found.confusion.classes,
        "counts": found.confusion.counts.tolist(),
    }
    names = ("source", "reference", "translation")
    samples = [dict(zip(names, sample, strict=False)) for sample in found.samples]
    plain = ("name", "workdir", "state", "step", "notes", "config", "environment", "attempts")
    return {
        **{name: getattr(found, name) for name in plain},
        "parameters": {
            name: {"numbers": numbers, "bytes": size}
            for name, (numbers, size) in found.parameters().items()
        },
        "results": found.last(),
        "speed": found.speed(),
        "confusion": confusion,
        "samples": samples,
    }
