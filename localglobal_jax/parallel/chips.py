# SPDX-License-Identifier: Apache-2.0
"""Published peaks of TPUs and GPUs, and what JAX calls them."""

import dataclasses
import re

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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU for an SXM socket, eight to a host. Link speeds are of one direction.

    Sources: NVIDIA's data sheets and architecture white papers of A100, H100, H200 and B200 (peaks
    without sparsity), and of DGX A100, H100 and B200 (one network card per GPU).
    """

    flops: float  # bf16 FLOP/s; a multiply-add is two
    tf32: float  # FLOP/s of float32 products on tensor cores, JAX's default
    float32: float  # FLOP/s of exact float32 products
    hbm: float  # bytes/s
    nvlink: float  # bytes/s to the other GPUs of the host
    network: float  # bytes/s to other hosts
    memory: float  # GiB that CUDA reports
    name: str  # as CUDA and JAX name the device
    capability: str
    cores: int  # streaming multiprocessors
    clock: float  # GHz, boost
    cache: int  # MiB of the second level
    shared: int  # KiB of shared memory per core, of which a block may use all but one
    lanes: int = 128  # float32 units per core
    devices: int = 1  # JAX devices per GPU


H100 = Gpu(
    name="NVIDIA H100 80GB HBM3", flops=989 * TERA, tf32=494 * TERA, float32=67 * TERA,
    hbm=3352 * GB, nvlink=450 * GB, network=50 * GB, memory=79.11,
    capability="9.0", cores=132, clock=1.98, cache=50, shared=228,
)  # fmt: skip
GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB", flops=312 * TERA, tf32=156 * TERA, float32=19.5 * TERA,
        hbm=2039 * GB, nvlink=300 * GB, network=25 * GB, memory=79.25,
        capability="8.0", cores=108, clock=1.41, cache=40, shared=164, lanes=64,
    ),
    "h100": H100,
    "h200": dataclasses.replace(H100, name="NVIDIA H200 141GB HBM3e", hbm=4800 * GB, memory=139.8),
    "b200": Gpu(
        name="NVIDIA B200", flops=2250 * TERA, tf32=1125 * TERA, float32=75 * TERA,
        hbm=7700 * GB, nvlink=900 * GB, network=50 * GB, memory=178.35,
        capability="10.0", cores=148, clock=1.965, cache=126, shared=228,
    ),
}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """FLOP/s in bf16 of the device that JAX calls `kind`; None where it is not known."""
    if kind in KINDS:
        chip = CHIPS[KINDS[kind]]
        return chip.flops / chip.devices
    words = re.split(r"[\s-]+", kind)  # "GB200" is no "B200"
    if not {"PCIe", "NVL", "MIG"}.isdisjoint(words):  # slower, or a part of one
        return None
    words = ["H200" if word == "GH200" else word for word in words]
    return next((gpu.flops for name, gpu in GPUS.items() if name.upper() in words), None)
