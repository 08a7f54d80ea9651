# SPDX-License-Identifier: Apache-2.0
"""The registry of back ends, and the checks that all of them share."""

import argparse
from typing import Any

from localglobal_jax.launch import local, slurm, tpu_vm, xpk
from localglobal_jax.launch.backend import Backend, Target

MODULES: tuple[Backend, ...] = (local, slurm, xpk, tpu_vm)
BACKENDS = {module.NAME: module for module in MODULES}


def takers(option: str) -> list[str]:
    """Returns the names of the back ends that take `option`."""
    return [b.NAME for b in MODULES if option in {known.name for known in b.OPTIONS}]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all back ends, one group each; a shared option is in the first group."""
    seen = set()
    for backend in MODULES:
        group = parser.add_argument_group(f"--backend {backend.NAME}")
        for option in backend.OPTIONS:
            if option.name in seen:
                continue
            seen.add(option.name)
            number: dict[str, Any] = {"type": int, "metavar": "N"}
            names = takers(option.name)
            group.add_argument(
                f"--{option.name}",
                help=option.help + (f" [{', '.join(names)}]" if len(names) > 1 else ""),
                action=option.action,
                **(number if option.least is not None else {}),
            )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for an option of another back end, a missing one, or one too small."""
    chosen = BACKENDS[args.backend]
    for option in dict.fromkeys(option.name for b in MODULES for option in b.OPTIONS):
        given, names = getattr(args, option), takers(option)
        if given is not None and given is not False and args.backend not in names:
            raise ValueError(f"--{option} is for --backend {' or '.join(names)}")
    numbers = {option.name: option.least for option in chosen.OPTIONS if option.least is not None}
    for name, least in {"devices": 1, **dict(sorted(numbers.items()))}.items():
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} {given}: at least {least}")
    chosen.check(args)
    for name in chosen.REQUIRED:
        if not getattr(args, name):
            raise ValueError(f"--backend {args.backend} needs --{name}")


def target(args: argparse.Namespace) -> Target | None:
    """Returns the devices and hosts of one run; None for the devices that JAX finds here."""
    return Target(args.devices) if args.devices else BACKENDS[args.backend].target(args)
