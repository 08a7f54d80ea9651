# SPDX-License-Identifier: Apache-2.0
"""How many devices and hosts a machine has that is known by its name only."""

import re
from typing import NamedTuple

from localglobal_jax.profiling import topologies

SINGLE = {"v5e", "v6e"}  # of these, up to 8 chips are one machine; else a machine has 4


class Target(NamedTuple):
    """Devices as JAX counts them, over all hosts of one run, and these hosts (processes)."""

    devices: int
    hosts: int = 1


def of_tpu(name: str, slices: int = 1) -> Target:
    """So many slices of ``v5litepod-256`` or ``v5p-128``, as the cloud names them."""
    if not re.fullmatch(r"v\w+-\d+", name):
        raise ValueError(f"--tpu_type {name}: want a name of the cloud, v5litepod-256 or v5p-128")
    found = topologies.parse(name)
    single = found.name.partition(":")[0] in SINGLE and found.chips <= 8
    return Target(found.devices * slices, (1 if single else max(1, found.chips // 4)) * slices)
