# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal score`: computes BLEU and chrF of translations."""

import argparse
import json
import pathlib

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
    add("--compound_split", action="store_true",
        help="of --tokenized text: hyphens between words are words, as in published BLEU of "
        "WMT14 English to German")  # fmt: skip
    add(
        "--tokenize",
        metavar="NAME",
        help="sacreBLEU's tokenizer: 13a, intl, zh, ja-mecab, ko-mecab, char, flores101, flores200 "
        "or none; default: that of the language in the name of REF (test.zh), or 13a",
    )


def run(args: argparse.Namespace) -> None:
    """Scores, and prints a report."""
    from localglobal_jax.data.text.files import read_lines
    from localglobal_jax.inference import bleu

    files = [args.hypotheses, args.references, *([args.source] if args.source else [])]
    if args.tokenized and args.tokenize:
        raise ValueError("--tokenized is text without --tokenize: give one of them")
    if args.compound_split and not args.tokenized:
        raise ValueError("--compound_split is for tokenised text: give --tokenized, too")
    texts = [read_lines(file) for file in files]
    language = pathlib.PurePath(args.references).suffix.removeprefix(".")
    known = bleu.language_of(language) in bleu.BY_LANGUAGE and not args.tokenized
    chosen = args.tokenize or (bleu.choose_tokenizer(language, texts[1]) if known else "13a")
    if args.compound_split:  # the lengths stay those of the source
        texts[:2] = map(bleu.compound_split, texts[:2])
    result = bleu.score(*texts, tokenized=args.tokenized, tokenize=chosen)
    print(json.dumps(result) if args.json else bleu.report(result))
