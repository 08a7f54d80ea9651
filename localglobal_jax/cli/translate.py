# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal translate`: translates text line by line."""

import argparse
import io
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from localglobal_jax.cli import options
from localglobal_jax.launch.exit_codes import ExitCode

NAME = "translate"
HELP = "translate lines of text"
EXAMPLE = "--workdir runs/muse < test.en > test.de"

BLOCK = 1024  # lines translated before they are printed
WAIT = 0.5  # seconds
CHUNK = 2**16  # bytes read at a time
UNKNOWN = 0.05  # share of unknown words above which a warning is printed
FORMATS = """\
A line in, a line out, in the same order; an empty line stays empty. With --scores: SCORE TAB TEXT.
With --nbest N: up to N lines for each, best first: NUMBER TAB SCORE TAB TEXT, NUMBER counting the
lines of the input from 1; an empty line has an empty score. SCORE is the sum of natural logarithms
of the tokens' probabilities over length ** length_penalty. With --json: one object with all of
this, and pieces and their scores. Only a line feed ends a line. Lines of a pipe are translated as
they arrive: up to 1024 at a time, and none waits longer than --wait for others. A line of more
than --max_source tokens is named on stderr and left empty; the exit code is then 2. Models with
fairseq's dictionaries need text that is tokenised and split into subwords (with @@) as their
training text was; words they do not know become <unk>. Their share is printed on stderr if it is
large."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_notes(parser, FORMATS)
    add = parser.add_argument
    add("--workdir", required=True, action="append", metavar="DIR",
        help="of a run, or of a converted checkpoint; several times: an ensemble, by the mean of "
        "the log probabilities")  # fmt: skip
    add(
        "file",
        nargs="?",
        metavar="FILE",
        help="UTF-8 text, a sentence per line; default, and -: stdin",
    )
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
    add("--wait", type=float, default=WAIT, metavar="SECONDS",
        help=f"that a line of a pipe waits for others, for one batch; default: {WAIT}")  # fmt: skip
    add("--replace_unknown", action="store_true",
        help="put the source word with the most attention for each <unk>")  # fmt: skip
    add("--attention", metavar="FILE.png",
        help="draw the cross-attention of the first sentence")  # fmt: skip
    add("--sample", action="store_true", help="draw at random instead of searching")
    add("--seed", type=int, help="of --sample; default: 0")
    add("--temperature", type=float, help="of --sample; default: 1")
    add("--top_k", type=int, help="of --sample: only among so many tokens; default: all")
    add("--top_p", type=float, help="of --sample: only among this probability; default: 1")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the computation; default: that of the run")  # fmt: skip
    options.add_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Translates the lines; returns 2 if some were too long."""
    sampling = _sampling(args)
    if not 0 <= args.wait <= 3600:
        raise ValueError(f"--wait {args.wait}: give seconds from 0 to 3600")
    from localglobal_jax.checkpoints import workdir

    if args.attention:
        from localglobal_jax.inference import heat_map

        workdir.check_local("--attention", args.attention, "file")
        heat_map.check(args.attention)
    for path in args.workdir:
        workdir.check_exists(path, workdir.without_checkpoint)
    from localglobal_jax.inference.translator import Sampling, defaults, load

    translator = load(args.workdir, args.step, args.average, dtype=args.dtype)
    chosen = {
        **defaults(args.workdir[0]),
        "nbest": 1 if args.nbest is None else args.nbest,
        "sampling": None if sampling is None else Sampling(**sampling),
        "replace_unknown": args.replace_unknown,
    }
    names = ("beam", "length_penalty", "min_length", "max_length", "max_source", "batch_size")
    chosen |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    file = None if args.file == "-" else args.file
    if not file and sys.stdin is None:
        raise ValueError("there is no standard input (it is closed): give a FILE")
    terminal = not file and sys.stdin.isatty()
    blocks = _blocks(file) if file else _arriving(0.0 if terminal else args.wait)
    if terminal:
        print("One sentence per line; Ctrl-D ends.", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]

    number, bad, drawn, everything = 0, 0, not args.attention, []
    unknown, words, warned = 0, 0, False
    for block in blocks:
        found = translator.translate(block, first=number, **chosen)
        unknown += sum(translation.unknown for translation in found)
        words += sum(max(0, translation.tokens - 1) for translation in found)
        if not warned and unknown > UNKNOWN * words:
            warned = True
            _warn_of_unknown(unknown, words, translator)
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


def _warn_of_unknown(unknown: int, words: int, translator: Any) -> None:
    form = "check that it is the language of the model's training"
    if translator.tokenizers.source.tokenized:
        form = (
            "tokenise it and split it into subwords (with @@), as the model's training text was; "
            "the model does not do this"
        )
    print(
        f"localglobal translate: {unknown} of the first {words} words ({unknown / words:.0%}) are "
        f"unknown to the model's vocabulary. If this text is what people write, {form}",
        file=sys.stderr,
    )


def _blocks(file: str) -> Iterator[list[str]]:
    """Returns blocks of lines of a file, which is read and decoded as a whole first."""
    from localglobal_jax.data.text import files

    lines = files.read_lines(file)
    return (lines[i : i + BLOCK] for i in range(0, len(lines), BLOCK))


def _arriving(wait: float) -> Iterator[list[str]]:
    """Yields blocks of lines of stdin while they arrive.

    A block is complete with `BLOCK` lines, `wait` seconds after its first line, or at the end.
    """
    from localglobal_jax.data.text import files

    readable, read = _input()
    ready: list[bytes] = []
    parts: list[bytes] = []  # of a line whose end is not here yet
    number, ended, feeds = 1, False, b""  # feeds: line feeds were seen
    while ready or not ended:
        deadline = time.monotonic() + wait
        while not ended and len(ready) < BLOCK:
            if not readable(max(0.0, deadline - time.monotonic()) if ready else None):
                break
            data, first = read(), not ready
            ended = not data
            head, *whole = data.split(b"\n")
            parts.append(head)
            feeds = b"\n" if whole else feeds
            if whole or (ended and any(parts)):
                ready += [b"".join(parts), *whole[:-1]]
                parts = whole[-1:]
            if first:
                deadline = time.monotonic() + wait
        block, ready = ready[:BLOCK], ready[BLOCK:]
        if block:
            lines = files.lines(b"\n".join(block) + feeds, "standard input", first=number)
            yield lines
            number += len(lines)


def _input() -> tuple[Callable[[float | None], Any], Callable[[], bytes]]:
    """Returns two functions of stdin: one waits for data, at most so long; one reads what is there.

    The second returns nothing at the end. A stdin that is not a file (in tests) is read at once.
    """
    try:
        file = sys.stdin.fileno()
    except io.UnsupportedOperation:
        return lambda seconds: True, sys.stdin.buffer.read
    return (
        lambda seconds: select.select([file], [], [], seconds)[0],
        lambda: os.read(file, CHUNK),
    )


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
    if translation.unknown:
        described["unknown_tokens"] = translation.unknown
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
