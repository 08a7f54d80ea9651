# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal translate`: translates text line by line."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.launch.exit_codes import ExitCode

NAME = "translate"
HELP = "translate lines of text"
EXAMPLE = "--workdir runs/muse < test.en > test.de"

BLOCK = 1024  # lines translated before they are printed
FORMATS = """\
A line in, a line out, in the same order; an empty line stays empty. With --scores: SCORE TAB TEXT.
With --nbest N: up to N lines for each, best first: NUMBER TAB SCORE TAB TEXT, NUMBER counting the
lines of the input from 1; an empty line has an empty score. SCORE is the sum of natural logarithms
of the tokens' probabilities over length ** length_penalty. With --json: one object with all of
this, and pieces and their scores. Only a line feed ends a line. A line of more than --max_source
tokens is named on stderr and left empty; the exit code is then 2. Models with fairseq's
dictionaries need text that is tokenised and split into subwords (with @@) as their training text
was; words they do not know become <unk>."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, FORMATS)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of a run, or of a converted checkpoint")
    add("file", nargs="?", metavar="FILE", help="UTF-8 text, a sentence per line; default: stdin")
    add("--beam", type=int, help="hypotheses kept by the search; default: that of the run, or 4")
    add("--length_penalty", type=float, help="default: that of the run, or 1")
    add("--min_length", type=int, default=1, metavar="TOKENS", help="of a translation; default: 1")
    add("--max_length", type=int, metavar="TOKENS",
        help="of a translation; default: 1.5 times the padded source, and 10")  # fmt: skip
    add("--max_source", type=int, metavar="TOKENS",
        help="lines with more are not translated; default: 1024")  # fmt: skip
    add("--batch_size", type=int, metavar="TOKENS", help="of the source; default: 2048")
    add("--nbest", type=int, metavar="N", help="print N translations of each line")
    add("--scores", action="store_true", help="print scores")
    add("--attention", metavar="FILE.png",
        help="draw the cross-attention of the first sentence")  # fmt: skip
    add("--sample", action="store_true", help="draw at random instead of searching")
    add("--seed", type=int, help="of --sample; default: 0")
    add("--temperature", type=float, help="of --sample; default: 1")
    add("--top_k", type=int, help="of --sample: only among so many tokens; default: all")
    add("--top_p", type=float, help="of --sample: only among this probability; default: 1")
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Translates the lines; returns 2 if some were too long."""
    sampling = _sampling(args)
    if args.attention:
        from localglobal_jax.inference import heat_map

        heat_map.check(args.attention)
    from localglobal_jax.inference.translator import Sampling, defaults, load

    translator = load(args.workdir, args.step, args.average)
    chosen = {
        **defaults(args.workdir),
        "nbest": 1 if args.nbest is None else args.nbest,
        "sampling": None if sampling is None else Sampling(**sampling),
    }
    names = ("beam", "length_penalty", "min_length", "max_length", "max_source", "batch_size")
    chosen |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    terminal = not args.file and sys.stdin.isatty()
    blocks = _typed() if terminal else _blocks(args.file)
    if terminal:
        print("One sentence per line; Ctrl-D ends.", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]

    number, bad, drawn, everything = 0, 0, not args.attention, []
    for block in blocks:
        found = translator.translate(block, first=number, **chosen)
        for line, translation in zip(block, found, strict=True):
            number += 1
            if translation.problem:
                bad += 1
                print(f"localglobal translate: line {number}: {translation.problem}",
                      file=sys.stderr)  # fmt: skip
            if translation.hypotheses and not drawn:
                drawn = True
                translator.attention(line, translation.hypotheses[0]).draw(args.attention)
            if args.json:
                everything.append(_described(number, translation, translator))
            else:
                print("\n".join(_shown(args, number, translation)))
        sys.stdout.flush()
    if args.json:
        print(json.dumps({"translations": everything}, ensure_ascii=False))
    if not drawn:
        raise ValueError(f"--attention {args.attention}: there was no sentence to draw")
    return ExitCode.WRONG if bad else ExitCode.DONE


def _sampling(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the options of sampling; None for search. Raises ValueError for a mix of both."""
    names = ("seed", "temperature", "top_k", "top_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and not args.sample:
        raise ValueError(f"--{next(iter(given))} is for --sample: give both, or none")
    if args.sample and args.beam is not None:
        raise ValueError("--sample has no --beam: it draws --nbest N translations")
    return given if args.sample else None


def _blocks(file: str | None) -> Iterator[list[str]]:
    """Returns blocks of lines of a file or stdin, which is read and decoded as a whole first."""
    from localglobal_jax.data.text import files

    lines = (
        files.read_lines(file) if file else files.lines(sys.stdin.buffer.read(), "standard input")
    )
    return (lines[i : i + BLOCK] for i in range(0, len(lines), BLOCK))


def _typed() -> Iterator[list[str]]:
    """Yields lines of stdin as they are typed."""
    from localglobal_jax.data.text import files

    for number, line in enumerate(sys.stdin.buffer, 1):
        yield files.lines(line, "standard input", first=number)


def _shown(args: argparse.Namespace, number: int, translation: Any) -> list[str]:
    """Returns the lines to print for one line of the input."""
    prefix = f"{number}\t" if args.nbest else ""
    if not translation.hypotheses:
        return [f"{prefix}\t" if args.nbest or args.scores else ""]
    if not (args.nbest or args.scores):
        return [translation.text]
    return [f"{prefix}{found.score:.4f}\t{found.text}" for found in translation.hypotheses]


def _described(number: int, translation: Any, translator: Any) -> dict[str, Any]:
    """Returns a translation as a JSON object."""
    described: dict[str, Any] = {"line": number, "source_tokens": translation.tokens}
    described["hypotheses"] = [
        {
            "text": found.text,
            "score": found.score,
            "pieces": translator.tokenizers.target.pieces(found.tokens),
            "token_scores": found.token_scores,
        }
        for found in translation.hypotheses
    ]
    return described | ({"problem": translation.problem} if translation.problem else {})
