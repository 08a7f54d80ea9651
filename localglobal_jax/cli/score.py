# SPDX-License-Identifier: Apache-2.0
"""``localglobal score``: BLEU and chrF of translations."""

import argparse
import json


def score(args: argparse.Namespace) -> None:
    from localglobal_jax.data.text.files import read_lines
    from localglobal_jax.inference import bleu

    files = [args.hypotheses, args.references, *([args.source] if args.source else [])]
    result = bleu.score(*map(read_lines, files), tokenized=args.tokenized)
    print(json.dumps(result) if args.json else bleu.report(result))
