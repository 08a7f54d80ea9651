# SPDX-License-Identifier: Apache-2.0
"""The command line: console script, parser, error reporting, exit codes (`launch.exit_codes`)."""

import argparse
import faulthandler
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from localglobal_jax import __version__
from localglobal_jax.cli import (
    bench,
    classify,
    configs,
    convert,
    evaluate,
    export,
    inspect,
    models,
    plan,
    prepare,
    report,
    score,
    sweep,
    train,
    translate,
)
from localglobal_jax.cli.options import Command
from localglobal_jax.config import extras
from localglobal_jax.launch.exit_codes import ExitCode

COMMANDS: tuple[Command, ...] = (
    train,
    evaluate,
    prepare,
    translate,
    classify,
    sweep,
    score,
    configs,
    convert,
    export,
    plan,
    bench,
    report,
    inspect,
    models,
)
# Loggers of which only warnings are shown.
NOISY = ("absl", "fsspec", "gcsfs", "httpx", "httpx2", "jax", "matplotlib", "orbax")

EXHAUSTED = {  # words of an error, and what to do
    "RESOURCE_EXHAUSTED": "Give a smaller batch_size or eval.batch_size, or more devices",  # XLA
    "can't start new thread": "Allow more memory or threads (ulimit -v, ulimit -u)",  # Python
}

# metavars of the help that stand for files and for directories
FILES = (
    *("FILE", "FILE[:ARG]", "FILE.csv", "FILE.html", "FILE.png", "DICT", "HYP", "REF", "SRC"),
    *("IMAGE", "PATH"),
)
DIRECTORIES = ("DIR", "ROOT", "WORKDIR")


def console() -> int:
    """Runs `main` as the console script."""
    if not debugging():
        os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # we report damaged files ourselves
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        sys.unraisablehook = functools.partial(_without_stragglers, sys.unraisablehook)
    if sys.__stderr__:  # a crash in native code prints the line of Python that called it
        faulthandler.enable(sys.__stderr__)
    return main()


def _without_stragglers(otherwise: Callable[[Any], Any], found: Any) -> None:
    """Hides the tracebacks of orbax's pending writes after a failed save.

    Nothing awaits these writes; `SaveFailed` reports the reason in one line.
    """
    if str(found.exc_value) != "Event loop is closed":
        otherwise(found)


def _without_sync_points(record: logging.LogRecord) -> bool:
    """Hides orbax's lines about a SIGTERM that hosts agree on, which `train` reports itself."""
    return "Reached preemption sync point" not in record.getMessage()


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        extras.check("localglobal")
    except extras.MissingExtra as error:
        print(error, file=sys.stderr)
        return ExitCode.WRONG
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, overrides = take_overrides(argv)
    argv, compared = take_overrides(argv, "--compare.")
    try:
        if not argv:
            parser().print_help(sys.stderr)
            return ExitCode.WRONG
        args, rest = parser().parse_known_args(argv)
        if rest:
            _refuse(args, rest)
    except BrokenPipeError:
        return _closed_pipe()
    args.overrides, args.compare_overrides = overrides, compared
    expand_home(args)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not debugging():
        logging.getLogger("absl").addFilter(_without_sync_points)
    try:
        if overrides and not args.takes_overrides:
            raise ValueError(f"{args.command} takes no --config.{next(iter(overrides))}")
        if compared and not args.takes_compare:
            raise ValueError(f"{args.command} takes no --compare.{next(iter(compared))}")
        code = args.run(args) or ExitCode.DONE
        sys.stdout.flush()  # raises here, and not at exit, if the reader has closed the pipe
        return code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # `| head` has ended
        return _closed_pipe()
    except (ValueError, OSError, RuntimeError) as error:
        advice = [advice for words, advice in EXHAUSTED.items() if words in str(error)]
        if advice and not debugging():
            what = f"out of memory: {_first_line(error)}"
            print(f"localglobal {args.command}: {what}. {advice[0]}", file=sys.stderr)
            return ExitCode.FAILED
        if debugging() or not is_expected(error):
            raise
        print(f"localglobal {args.command}: {error}", file=sys.stderr)
        return ExitCode.WRONG if isinstance(error, ValueError) else ExitCode.FAILED


def _refuse(args: argparse.Namespace, rest: list[str]) -> NoReturn:
    """Ends with the usage of the command, for arguments that it does not have."""
    field = " (a field of the config is --config.FIELD=VALUE)" if args.takes_overrides else ""
    commands_of(parser())[args.command].error(f"unrecognized arguments: {' '.join(rest)}{field}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(". ")


def debugging() -> bool:
    """Returns whether errors are shown with tracebacks."""
    return bool(os.environ.get("LOCALGLOBAL_DEBUG"))


def is_expected(error: Exception) -> bool:
    """Returns whether one line explains `error`: a ValueError, an OSError or one of ours."""
    package = __name__.partition(".")[0]
    ours = type(error).__module__.partition(".")[0] == package
    return ours or type(error) is ValueError or isinstance(error, OSError)


def _closed_pipe() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.FAILED


def take_overrides(argv: list[str], prefix: str = "--config.") -> tuple[list[str], dict[str, str]]:
    """Splits ``--config.a.b=v`` (or ``--config.a.b v``) from `argv`; returns the rest and these."""
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


def expand_home(args: argparse.Namespace) -> None:
    """Puts the home directory for a leading "~" of every path in `args`.

    A shell leaves it in ``--workdir=~/runs``.
    """
    for action in commands_of(parser())[args.command]._actions:
        if action.metavar in (*FILES, *DIRECTORIES):
            given = getattr(args, action.dest)
            if isinstance(given, str):
                setattr(args, action.dest, os.path.expanduser(given))
            elif isinstance(given, list | tuple):
                setattr(args, action.dest, [os.path.expanduser(path) for path in given])


def commands_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parser of every command, by name."""
    (found,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="localglobal",
        description="Train and use models that join convolution and self-attention.",
        epilog="Exit codes: 0 done, 42 preempted (state saved, start again to resume), "
        "2 wrong config or input, 3 diverged, 130 interrupted, 1 anything else. "
        "LOCALGLOBAL_DEBUG=1: tracebacks.",
    )
    top.add_argument("--version", action="version", version=f"localglobal_jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            epilog=f"Example: localglobal {command.NAME} {command.EXAMPLE}",
        )
        sub.set_defaults(run=command.run, takes_overrides=False, takes_compare=False)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        command.add_options(sub)
    add_completion(top, commands.choices.values())
    return top


def add_completion(top: argparse.ArgumentParser, subs: Iterable[argparse.ArgumentParser]) -> None:
    """Adds ``--print_completion SHELL``: shell code that completes commands, options and files."""
    import shtab

    shtab.add_argument_to(
        top,
        "--print_completion",
        help='shell code for completion: eval "$(localglobal --print_completion bash)"',
    )
    for sub in subs:
        for action in sub._actions:
            kind = shtab.FILE if action.metavar in FILES else shtab.DIR
            if action.metavar in (*FILES, *DIRECTORIES):
                action.complete = kind  # type: ignore[attr-defined] # shtab reads it
