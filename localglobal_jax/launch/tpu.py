# SPDX-License-Identifier: Apache-2.0
"""Options, device counts and checks that the TPU back ends `xpk` and `tpu_vm` share."""

import argparse
import functools
import pathlib
import re

from localglobal_jax.checkpoints.workdir import is_remote
from localglobal_jax.launch.backend import Option, Target
from localglobal_jax.launch.expand import Description
from localglobal_jax.profiling import topologies
from localglobal_jax.training.reporting import git

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


def accelerator(name: str) -> str:
    """Returns the cloud's name of a type: v5litepod-16 for v5e-16."""
    return name.replace("v5e-", "v5litepod-")


def notices(spec: str, how: str) -> tuple[str, ...]:
    """Returns why the machines may not have the config file of ``FILE[:arg]``, as it is here.

    They run the file of their own copy. `how`: what brings that copy.
    """
    name = spec.partition(":")[0]
    file = pathlib.Path(name).expanduser()
    if not file.is_file():  # a packaged config
        return ()
    found = []
    if file.is_absolute() or ".." in file.parts:
        found.append(f"{name}: the machines look at this very path; a relative one is safer")
    run_git = functools.partial(git.output, file.absolute().parent)
    inside = run_git("ls-files", "--error-unmatch", file.name)
    if run_git("rev-parse", "HEAD") is None:
        found.append(f"{name} is in no git commit: {how} has to bring it to the machines")
    elif inside is None:
        found.append(f"{name} is not in git: {how} has to bring it to the machines")
    elif run_git("status", "--porcelain", "--", file.name):
        found.append(f"{name} has changes that are not committed: the machines may not have them")
    elif run_git("remote") and not run_git("branch", "-r", "--contains", "HEAD"):
        found.append(f"the commit of {name} is on no remote branch: the machines may not have it")
    return tuple(found)


def command(run: Description) -> tuple[str, ...]:
    """Returns the command that every host of `run` executes."""
    return ("localglobal", "train", "--distributed", *run.arguments[1:])
