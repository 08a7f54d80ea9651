# SPDX-License-Identifier: Apache-2.0
"""The TPU slices that exist, and their names. Pure.

A slice is written as libtpu writes it ("v5e:16x16") or as Google Cloud sells it ("v5e-256",
"v5litepod-256", "v5p-1024": of v2, v3, v4, v5p and tpu7x the number counts cores, two a chip).
libtpu aborts the process on some slices that do not exist, so they raise an error here.
"""

import dataclasses
import math
import re

from localglobal_jax.config.validation import unknown
from localglobal_jax.parallel.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice; with `chip` None, that many placeholder CPU devices."""

    name: str  # as libtpu wants it
    chips: int
    chip: Chip | None

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of libtpu."""
        if self.chip is None:
            return {}
        found: dict[str, object] = dict(self.chip.options)
        if self.chips < 4:
            sizes = [int(n) for n in self.name.split(":")[1].split("x")]
            found["chips_per_host_bounds"] = tuple((*sizes, 1, 1)[:3])
        return found

    @property
    def usable_bytes(self) -> int | None:
        """Memory of one device that a program may use, in bytes; None for CPU devices."""
        return int(self.chip.usable * 2**30) if self.chip else None

    def peak(self, what: str) -> float | None:
        """Returns peak ``flops``, ``hbm`` or ``ici`` of one device, per second; None for a CPU."""
        return getattr(self.chip, what) / self.chip.devices if self.chip else None


def parse(text: str) -> Topology:
    """Returns the slice of that name. Raises ValueError, with the known ones, for any other."""
    if cpu := re.fullmatch(r"cpu:(\d+)", text):
        if not 1 <= int(cpu[1]) <= 1024:
            raise ValueError(f"topology {text}: give 1 to 1024 placeholder devices")
        return Topology(text, int(cpu[1]), None)
    if (shape := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)) and shape[1] != "cpu":
        return _shaped(text, shape[1], [int(n) for n in shape[2].split("x")])
    if (cloud := re.fullmatch(r"(\w+)-(\d+)", text)) and cloud[1] != "cpu":
        return _cloud(text, cloud[1], int(cloud[2]))
    _known(re.split(r"[:\-=]", text)[0])
    raise ValueError(f"topology {text}: write v5e:16x16, v5p:8x8x8, v5e-256, or cpu:8")


def _known(kind: str) -> str:
    """Returns this package's name of a chip; accepts the cloud's name too."""
    names = {"cpu", *CHIPS, *(name for chip in CHIPS.values() for name in chip.cloud)}
    if kind not in names:
        raise unknown("chip in --topology:", kind, names)
    return next((name for name, chip in CHIPS.items() if kind in chip.cloud), kind)


def _shaped(text: str, kind: str, sizes: list[int]) -> Topology:
    kind = _known(kind)
    chip = CHIPS[kind]
    limit = "x".join(map(str, chip.limits))
    small = kind in ("v5e", "v6e") and sizes in ([1, 1], [1, 2], [2, 1])
    if len(sizes) == len(chip.limits) and small:
        return Topology(f"{kind}:{sizes[0]}x{sizes[1]}", math.prod(sizes), chip)
    whole_hosts = len(sizes) > 1 and sizes[0] % 2 == sizes[1] % 2 == 0  # 2x2x1 chips a host
    inside = all(0 < n <= most for n, most in zip(sorted(sizes), sorted(chip.limits), strict=False))
    if len(sizes) != len(chip.limits) or not whole_hosts or not inside:
        raise ValueError(
            f"topology {text}: a slice of {kind} has {len(chip.limits)} sizes, the first two even "
            f"(a host has 2x2 chips), from {'x'.join('221'[: len(chip.limits)])} to {limit}"
            + ("; 1x1 and 1x2 are allowed too" if kind in ("v5e", "v6e") else "")
        )
    return Topology(f"{kind}:{'x'.join(map(str, sizes))}", math.prod(sizes), chip)


def _cloud(text: str, kind: str, number: int) -> Topology:
    kind = _known(kind)
    chip = CHIPS[kind]
    scale = 2 if chip.counts_cores else 1
    known = cloud_sizes(chip)
    if number % scale or number // scale not in known:
        sizes = ", ".join(str(scale * n) for n in known)
        shape = "x".join("4" * len(chip.limits))
        raise ValueError(
            f"topology {text}: {chip.cloud[0]}-N counts {'cores' if scale == 2 else 'chips'} and "
            f"is one of {sizes}; write other slices as {kind}:{shape}"
        )
    return _shaped(text, kind, list(known[number // scale]))


def cloud_sizes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Returns shapes by number of chips of slices with a cloud name: powers of 2, near cubes."""
    known: dict[int, tuple[int, ...]] = {}
    if len(chip.limits) == 2:
        shape: tuple[int, ...] = (1, 1) if "v5e" in chip.cloud or "v6e" in chip.cloud else (2, 2)
    else:
        shape = (2, 2, 1)
    while all(n <= most for n, most in zip(shape, sorted(chip.limits), strict=True)):
        if math.prod(shape) != 2:
            known[math.prod(shape)] = shape
        last = min(shape)  # double the last of the smallest: 2x2x4, 2x4x4, 4x4x4
        at = len(shape) - 1 - shape[::-1].index(last)
        shape = tuple(2 * n if i == at else n for i, n in enumerate(shape))
    return known
