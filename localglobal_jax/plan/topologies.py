# SPDX-License-Identifier: Apache-2.0
"""Which TPU slices there are, what they are called, and their published peaks. Pure.

A slice is written as libtpu writes it ("v5e:16x16") or as Google Cloud sells it ("v5e-256",
"v5litepod-256", "v5p-1024": of v2, v3, v4, v5p and tpu7x the number counts cores, two a chip).
libtpu aborts the process on some slices that do not exist, so they are refused here.
"""

import dataclasses
import math
import re

from localglobal_jax.configlib import unknown

GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Peaks are of a whole chip.

    Sources: cloud.google.com/tpu/docs (system architecture, v2 to tpu7x), arXiv 2304.01433, table
    4, for the links of v2 to v4. `ici` is what a chip can send over all its links together.
    """

    flops: float  # bf16 FLOP/s; a multiply-add is two
    hbm: float  # bytes/s
    ici: float  # bytes/s
    usable: float  # GiB of memory per JAX device that a program may use, as libtpu reports it
    limits: tuple[int, ...]  # chips along each axis of the largest slice
    devices: int = 1  # JAX devices per chip
    cloud: tuple[str, ...] = ()  # names before the number
    counts_cores: bool = False  # the number in a cloud name is two per chip
    options: tuple[tuple[str, str], ...] = ()  # of libtpu
    # Of the matrix units, to turn the compiler's cycles into time: v2 to v4 as published, v5e to
    # v6e inferred from the peak and the number of units; None: not known.
    clock: float | None = None


MEGACORE = (("chip_config_name", "megacore"),)  # v4's two cores as one device, as users run it
CHIPS = {
    "v2": Chip(45 * TERA, 700 * GB, 248 * GB, 7.48, (16, 16), 2, ("v2",), True, (), 0.70e9),
    "v3": Chip(123 * TERA, 900 * GB, 280 * GB, 15.48, (32, 32), 2, ("v3",), True, (), 0.94e9),
    "v4": Chip(
        *(275 * TERA, 1228 * GB, 300 * GB, 30.75, (16, 16, 16), 1, ("v4",), True),
        options=MEGACORE,
        clock=1.05e9,
    ),
    "v5e": Chip(
        *(197 * TERA, 819 * GB, 200 * GB, 15.75, (16, 16), 1, ("v5e", "v5litepod")), clock=1.5e9
    ),
    "v5p": Chip(
        *(459 * TERA, 2765 * GB, 600 * GB, 95.73, (16, 20, 28), 1, ("v5p",), True), clock=1.75e9
    ),
    "v6e": Chip(918 * TERA, 1640 * GB, 448 * GB, 31.24, (16, 16), 1, ("v6e",), clock=1.75e9),
    "tpu7x": Chip(
        *(2307 * TERA, 7380 * GB, 1200 * GB, 94.74, (16, 24, 24), 2, ("tpu7x", "v7x"), True)
    ),
}
# Peaks of CPU depend on the machine: none are given, and bounds are left out.
KINDS = {  # as JAX names a device -> its generation
    "TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# bf16 FLOP/s without sparsity, from NVIDIA's data sheets, of the cards for SXM sockets
GPUS = {"A100": 312 * TERA, "H100": 989 * TERA, "H200": 989 * TERA}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or `count` pretended CPU devices where `chip` is None."""

    name: str  # as libtpu wants it
    chips: int
    chip: Chip | None

    @property
    def devices(self) -> int:
        """JAX devices."""
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
        """Memory of one device that a program may use; None: as much as the machine has."""
        return int(self.chip.usable * 2**30) if self.chip else None

    def peak(self, what: str) -> float | None:
        """``flops``, ``hbm`` or ``ici`` of one device."""
        return getattr(self.chip, what) / self.chip.devices if self.chip else None


def peak_flops(kind: str) -> float | None:
    """FLOP/s in bf16 of the device that JAX calls `kind`; None where it is not known."""
    if kind in KINDS:
        chip = CHIPS[KINDS[kind]]
        return chip.flops / chip.devices
    slower = "PCIe" in kind or "NVL" in kind
    return next((peak for name, peak in GPUS.items() if name in kind and not slower), None)


def parse(text: str) -> Topology:
    """Raises ValueError, saying what there is, for a slice that does not exist."""
    if cpu := re.fullmatch(r"cpu:(\d+)", text):
        if not 1 <= int(cpu[1]) <= 1024:
            raise ValueError(f"topology {text}: give 1 to 1024 pretended devices")
        return Topology(text, int(cpu[1]), None)
    if (shape := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)) and shape[1] != "cpu":
        return _shaped(text, shape[1], [int(n) for n in shape[2].split("x")])
    if (cloud := re.fullmatch(r"(\w+)-(\d+)", text)) and cloud[1] != "cpu":
        return _cloud(text, cloud[1], int(cloud[2]))
    _known(re.split(r"[:\-=]", text)[0])
    raise ValueError(f"topology {text}: write v5e:16x16, v5p:8x8x8, v5e-256, or cpu:8")


def _known(kind: str) -> str:
    """Our name of a chip, from ours or the cloud's."""
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
    """Chips -> shape, of the slices that a cloud name may stand for: powers of two, near cubes."""
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
