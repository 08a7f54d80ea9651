# SPDX-License-Identifier: Apache-2.0
"""How many devices and hosts a machine has that is known by its name only."""

import math
import re
from typing import NamedTuple


class Target(NamedTuple):
    """Devices as JAX counts them, over all hosts of one run, and these hosts (processes)."""

    devices: int
    hosts: int = 1


# In cloud names the number counts TensorCores up to v5p, of which a chip has two, and chips after.
CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}
DEVICES = {"v2": 2, "v3": 2, "tpu7x": 2}  # per chip, where JAX sees more than one
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
KINDS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")


def of_tpu(name: str, slices: int = 1) -> Target:
    """``v5e-256``, ``v5litepod-256`` or ``v5e:16x16``, so many slices of it."""
    found = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    kind = ALIASES.get(found[1], found[1]) if found else ""
    if not found or kind not in KINDS:
        raise ValueError(
            f'TPU type "{name}": write KIND-NUMBER or KIND:AxB, for instance v5e-256 or '
            f"v5e:16x16; kinds: {', '.join(KINDS)}"
        )
    if found[3]:
        chips = math.prod(map(int, found[3].split("x")))
    else:
        chips = int(found[2]) // CORES.get(kind, 1)
    if chips < 1:
        raise ValueError(f'TPU type "{name}" has no chip')
    # Machines have 4 chips; v5e and v6e of up to 8 are one machine.
    single = chips <= 8 and kind in ("v5e", "v6e")
    return Target(
        chips * DEVICES.get(kind, 1) * slices, (1 if single else max(1, chips // 4)) * slices
    )
