# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal score`: computes BLEU and chrF of translations."""

import argparse
import json

NAME = "score"
HELP = "BLEU and chrF of translations"
EXAMPLE = "hyp.de test.de --source test.en"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("hypotheses", metavar="HYP", help="a translation per line")
    add("references", metavar="REF", help="a reference translation per line")
    add("--source", metavar="SRC", help="also score by length of the source")
    add("--tokenized", action="store_true",
        help="words stand between blanks: BLEU of tokenised text")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Scores, and prints a report."""
    from localglobal_jax.data.text.files import read_lines
    from localglobal_jax.inference import bleu

    files = [args.hypotheses, args.references, *([args.source] if args.source else [])]
    result = bleu.score(*map(read_lines, files), tokenized=args.tokenized)
    print(json.dumps(result) if args.json else bleu.report(result))
