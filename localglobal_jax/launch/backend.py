# SPDX-License-Identifier: Apache-2.0
"""The interface `Backend`, which `local`, `slurm`, `xpk` and `tpu_vm` implement."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from localglobal_jax.launch.exit_codes import ExitCode
from localglobal_jax.launch.expand import Description, Sweep


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of `localglobal sweep` that belongs to one or more back ends.

    `least`: the smallest number allowed; None for an option that takes text. `action`: of argparse.
    """

    name: str
    help: str
    least: int | None = None
    action: str = "store"


# Options that several back ends take.
SLOTS = Option("slots", "runs at a time (local: 1; slurm, tpu-vm: all)", least=1)
RETRIES = Option("retries", "restarts of a run that crashed (2)", least=0)


class Target(NamedTuple):
    """The number of devices of a run, over all its hosts, and of its hosts (processes)."""

    devices: int
    hosts: int = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """Runs to start with the options `args`; every run gets the environment `env`.

    `finished`: runs that were asked for and have finished, which are not among `runs`.
    """

    args: argparse.Namespace
    sweep: Sweep
    runs: Sequence[Description]
    env: Mapping[str, str]
    finished: Sequence[Description] = ()


@dataclasses.dataclass(frozen=True)
class Launch:
    """The commands and scripts of a request.

    `shown`: the commands of each run by its name, for people. `files`: scripts by file name,
    without secrets. `commands`: argument lists, by name of a run or of a script. `image`: the
    Docker image of the runs. `notices`: what a person should know before the start.
    """

    shown: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]
    commands: Mapping[str, tuple[str, ...]]
    image: str | None = None
    notices: tuple[str, ...] = ()


class Started(NamedTuple):
    """The exit code of a launch, and the state of each run by its name: ``{"state": ...}``."""

    code: ExitCode
    runs: Mapping[str, Mapping[str, Any]]


Say = Callable[[str], Any]  # prints a line of progress


class Backend(Protocol):
    """A module that starts runs on one kind of machine. All but `start` is pure."""

    NAME: str
    OPTIONS: tuple[Option, ...]
    REQUIRED: tuple[str, ...]  # names of options

    def check(self, args: argparse.Namespace) -> None:
        """Raises ValueError for options that the back end cannot use."""

    def target(self, args: argparse.Namespace) -> Target | None:
        """Returns the devices and hosts of one run; None for the devices that JAX finds here."""

    def launch(self, request: Request) -> Launch:
        """Returns commands and scripts."""

    def start(self, request: Request, environment: Mapping[str, str], say: Say) -> Started:
        """Starts the runs. `environment`: of this process, without `request.env`."""


def python_command() -> tuple[str, ...]:
    """Returns the words that start `localglobal` with this Python."""
    return (sys.executable, "-m", __name__.partition(".")[0])
