# SPDX-License-Identifier: Apache-2.0
"""The shape of a command, and the options that several commands share."""

import argparse
from typing import Protocol


class Command(Protocol):
    """A module with one command. It imports no jax before `run` needs it."""

    NAME: str
    HELP: str
    EXAMPLE: str  # options of an example call

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's options, except ``--json``."""

    def run(self, args: argparse.Namespace) -> int | None:
        """Runs the command; returns the exit code, or None for 0."""


def add_notes(parser: argparse.ArgumentParser, notes: str) -> None:
    """Puts `notes`, with their line breaks, before the example of the help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{notes}\n\n{parser.epilog}"


def take_overrides(parser: argparse.ArgumentParser) -> None:
    """Allows ``--config.a.b=VALUE``; `main` parses these into ``args.overrides``."""
    parser.set_defaults(takes_overrides=True)


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds ``--config``, and allows ``--config.a.b=VALUE``."""
    take_overrides(parser)
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:ARG]",
        help="a config file; override fields with --config.a.b=VALUE",
    )


def check_workdir(path: str) -> None:
    """Raises ValueError for an empty ``--workdir``, as of a shell variable that is not set."""
    if not path.strip():
        raise ValueError("--workdir is empty: give the directory where everything is written")


def add_compare(parser: argparse.ArgumentParser, how: str) -> None:
    """Adds ``--compare``, and allows ``--compare.a.b=VALUE``."""
    parser.set_defaults(takes_compare=True)
    parser.add_argument(
        "--compare",
        metavar="FILE[:ARG]",
        help=f"a second config, {how}; override its fields with --compare.a.b=VALUE, which alone "
        "compares the first config with itself",
    )


def add_part(parser: argparse.ArgumentParser) -> None:
    """Adds ``--step train|eval|decode``."""
    parser.add_argument(
        "--step", choices=("train", "eval", "decode"), default="train", help="default: train"
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """Adds ``--step``, the checkpoint to read."""
    parser.add_argument("--step", help='of the checkpoint: a number or "best"; default: the newest')


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds ``--step`` and ``--average``, the checkpoints to read."""
    add_step(parser)
    parser.add_argument(
        "--average",
        type=int,
        default=1,
        metavar="N",
        help="mean of N checkpoints, this one and those before",
    )
