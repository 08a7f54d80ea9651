# SPDX-License-Identifier: Apache-2.0
"""The command line. Parses, calls, prints; exit codes: 0 done, 42 preempted (state saved),
2 the user's config or input is wrong, 3 training diverged, 1 anything else."""

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from localglobal_jax import __version__
from localglobal_jax.cli import (
    bench,
    classify,
    convert,
    inspect,
    models,
    plan,
    report,
    sweep,
    train,
    translate,
)
from localglobal_jax.cli.evaluate import evaluate
from localglobal_jax.cli.prepare import prepare
from localglobal_jax.cli.score import score

OWN_FILES = (  # of commands: their options and what they print
    ("convert", convert, "other people's weights to a checkpoint of ours",
     "timm coatnet_0_rw_224.safetensors --out runs/coatnet_0_rw"),
    ("plan", plan, "compile for a TPU pod without one: does it fit? how fast at most?",
     "--config configs/coatnet_imagenet.py --topology v5e-256"),
    ("bench", bench, "how fast is this machine? two configs in turns",
     "--config configs/coatnet_digits.py --compare.dtype=bfloat16"),
    ("report", report, "a page (HTML) of one run, or of several side by side",
     "runs/digits runs/digits_2 --out report.html"),
    ("inspect", inspect, "what is in a checkpoint", "runs/digits --verify"),
    ("models", models, "named models: sizes beside the papers'", "coatnet_0 volo_d1"),
)  # fmt: skip
TAKE_OVERRIDES = ("train", "evaluate", "classify", "prepare", "plan", "sweep", "bench")

# what stands for files and for directories in the help
FILES = (
    "FILE",
    "FILE[:ARG]",
    "FILE.csv",
    "FILE.html",
    "FILE.png",
    "DICT",
    "HYP",
    "REF",
    "SRC",
    "IMAGE",
    "PATH",
)
DIRECTORIES = ("DIR", "ROOT", "WORKDIR")


def console() -> int:
    """The console script: `main`, in a process whose large allocations use large pages."""
    # On CPU, XLA asks the system for its temporary memory anew at every step. In pages of 4 KiB
    # page faults took half of the CPU time of a training step here (345 images/s against 563 with
    # large pages), and glibc reads this setting only when a process starts.
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # nosec B606 # ourselves
    if not os.environ.get("LOCALGLOBAL_DEBUG"):
        os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # what is wrong with a file, we say
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_stragglers
    if sys.__stderr__:  # a crash in native code says which line of Python was there
        faulthandler.enable(sys.__stderr__)
    return main()


def _without_stragglers(found: Any) -> None:
    """Of a save that failed, orbax leaves writes behind that nobody waits for; each would print a
    traceback here, or in the log of asyncio. Why it failed is said in a line (`SaveFailed`)."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, overrides = take_overrides(argv)
    argv, compared = take_overrides(argv, "--compare.")
    try:
        if not argv:
            parser().print_help(sys.stderr)
            return 2
        args = parser().parse_args(argv)
    except BrokenPipeError:
        return _nobody_reads()
    args.overrides, args.compare_overrides = overrides, compared
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "matplotlib", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if overrides and args.command not in TAKE_OVERRIDES:
            raise ValueError(f"{args.command} takes no --config.{next(iter(overrides))}")
        if compared and args.command not in ("bench", "plan"):
            raise ValueError(f"{args.command} takes no --compare.{next(iter(compared))}")
        code = args.run(args) or 0
        sys.stdout.flush()  # a reader that has gone away shows here, not when Python ends
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        return _nobody_reads()
    except (ValueError, OSError, RuntimeError) as error:
        code = 2 if isinstance(error, ValueError) else 1
        ours = type(error) in (ValueError, OSError) or type(error).__module__.startswith(
            __name__.partition(".")[0]
        )
        if os.environ.get("LOCALGLOBAL_DEBUG") or not (ours or isinstance(error, OSError)):
            raise
        print(f"localglobal {args.command}: {error}", file=sys.stderr)
        return code


def _nobody_reads() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def take_overrides(argv: list[str], prefix: str = "--config.") -> tuple[list[str], dict[str, str]]:
    """Takes ``--config.a.b=v`` (or ``--config.a.b v``) out of `argv`."""
    rest, overrides, i = [], {}, 0
    while i < len(argv):
        if argv[i].startswith(prefix):
            field, equals, value = argv[i].removeprefix(prefix).partition("=")
            if not equals:
                given = i + 1 < len(argv) and not argv[i + 1].startswith("--")
                value = argv[i + 1] if given else "true"
                i += given
            overrides[field] = value
        else:
            rest.append(argv[i])
        i += 1
    return rest, overrides


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(
        prog="localglobal",
        description="Train and use models that join convolution and self-attention.",
        epilog="Exit codes: 0 done, 42 preempted (state saved, start again to resume), "
        "2 wrong config or input, 3 diverged, 1 anything else. LOCALGLOBAL_DEBUG=1: tracebacks.",
    )
    top.add_argument("--version", action="version", version=f"localglobal_jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=f"Example: localglobal {name} {example}"
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return sub

    def add_config(sub: argparse.ArgumentParser, required: bool = True) -> None:
        sub.add_argument("--config", required=required, metavar="FILE[:ARG]",
                         help="a config file; override fields with --config.a.b=VALUE")  # fmt: skip

    def add_step(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--step", help='a number or "best"; default: the newest')
        sub.add_argument("--average", type=int, default=1, metavar="N",
                         help="mean of N checkpoints, this one and those before")  # fmt: skip

    digits = "--config configs/coatnet_digits.py"
    example = f"{digits} --workdir runs/digits"
    sub = command("train", train.run, "train, or resume, a run", example)
    add_config(sub)
    train.add_options(sub)

    sub = command("evaluate", evaluate, "evaluate a checkpoint", "--workdir runs/digits")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    add_step(sub)

    sub = command("prepare", prepare, "prepare a data set, check it, print counts", digits)
    add_config(sub, required=False)
    sub.add_argument("name", nargs="?", metavar="NAME", help="a TFDS name, instead of --config")
    sub.add_argument("--dir", metavar="DIR", help="TFDS data directory")
    sub.add_argument("--source", metavar="DIR", help="files already downloaded")
    sub.add_argument("--from_tfrecord", metavar="DIR", help="convert a TFRecord data set")

    example = "--workdir runs/muse < test.en > test.de"
    sub = command("translate", translate.run, "translate lines of text", example)
    translate.add_options(sub)
    add_step(sub)

    example = "--workdir runs/mine PICTURES --overlay seen"
    sub = command("classify", classify.run, "name what is in pictures", example)
    classify.add_options(sub)
    add_step(sub)

    sub = command("sweep", sweep.run, "many runs of one config", sweep.EXAMPLE)
    add_config(sub)
    sweep.add_options(sub)

    example = "hyp.de test.de --source test.en"
    sub = command("score", score, "BLEU and chrF of translations", example)
    sub.add_argument("hypotheses", metavar="HYP", help="a translation per line")
    sub.add_argument("references", metavar="REF", help="what it should be")
    sub.add_argument("--source", metavar="SRC", help="also score by length of the source")
    sub.add_argument("--tokenized", action="store_true",
                     help="words stand between blanks: BLEU of tokenised text")  # fmt: skip

    for name, room, about, example in OWN_FILES:
        room.add_options(command(name, room.run, about, example))
    complete(top, commands.choices.values())
    return top


def complete(top: argparse.ArgumentParser, subs: Iterable[argparse.ArgumentParser]) -> None:
    """``--print_completion SHELL``: what a shell reads to complete commands, options and files."""
    import shtab

    shtab.add_argument_to(top, "--print_completion", help="for a shell to read, see the README")
    for sub in subs:
        for action in sub._actions:
            kind = shtab.FILE if action.metavar in FILES else shtab.DIR
            if action.metavar in (*FILES, *DIRECTORIES):
                action.complete = kind  # type: ignore[attr-defined] # shtab reads it
