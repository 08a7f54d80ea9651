# SPDX-License-Identifier: Apache-2.0
"""Options, device counts and checks that the TPU back ends `xpk` and `tpu_vm` share."""

import argparse
import re

from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.launch.backend import Option, Target
from localglobal_jax.launch.expand import Description
from localglobal_jax.profiling import topologies

OPTIONS = (
    Option("tpu_type", "v5litepod-256, v5p-128, ..."),
    Option("project", "project of Google Cloud (gcloud's default)"),
    Option("zone", "zone of Google Cloud"),
)
SINGLE = {"v5e", "v6e"}  # up to 8 chips of these are one host; otherwise a host has 4 chips


def check_workdir(args: argparse.Namespace) -> None:
    """Raises ValueError for a workdir that is deleted with the machines."""
    if not is_remote(args.workdir):
        raise ValueError(
            f"--backend {args.backend} needs a --workdir that outlives its machines: "
            "gs://BUCKET/PATH"
        )


def target(name: str, slices: int = 1) -> Target:
    """Returns devices and hosts of `slices` slices of a cloud type, ``v5litepod-256``.

    Raises ValueError for a type that is not one of the cloud's.
    """
    if not re.fullmatch(r"v\w+-\d+", name):
        raise ValueError(f"--tpu_type {name}: want a name of the cloud, v5litepod-256 or v5p-128")
    found = topologies.parse(name)
    single = found.name.partition(":")[0] in SINGLE and found.chips <= 8
    return Target(found.devices * slices, (1 if single else max(1, found.chips // 4)) * slices)


def command(run: Description) -> tuple[str, ...]:
    """Returns the command that every host of `run` executes."""
    return ("localglobal", "train", "--distributed", *run.arguments[1:])
