# SPDX-License-Identifier: Apache-2.0
"""The TPU slices and GPU clusters that exist, and their names. Pure.

A slice has libtpu's name ("v5e:16x16") or Google Cloud's ("v5e-256",
"v5litepod-256", "v5p-1024": of v2, v3, v4, v5p and tpu7x the number counts cores, two a chip).
libtpu aborts the process on some slices that do not exist, so they raise an error here.
GPUs are written by their number ("h100-64": hosts of eight) or as hosts x GPUs ("h100:8x8").
"""

import dataclasses
import math
import re

from localglobal_jax.config.validation import unknown
from localglobal_jax.parallel.chips import CHIPS, GPUS, Chip, Gpu

CUDNN = "9.28.0"  # the compiler chooses from what this version has
HOST = 8  # GPUs of a full host
# The share of a GPU's memory that JAX allocates, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
GPU_MEMORY_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice or a GPU cluster; with `chip` None, that many placeholder CPU devices."""

    name: str  # of a slice as libtpu wants it; of GPUs as hosts x GPUs
    chips: int
    chip: Chip | Gpu | None
    hosts: int = 1  # of a GPU cluster

    @property
    def platform(self) -> str:
        """The platform that compiles: "tpu", "cuda" or "cpu"."""
        return {Chip: "tpu", Gpu: "cuda"}.get(type(self.chip), "cpu")

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of the platform's description of a topology."""
        if isinstance(self.chip, Gpu):
            slices_hosts_gpus = f"1x{self.hosts}x{self.chips // self.hosts}"
            return {"topology": slices_hosts_gpus, "target_config": gpu_target(self.chip)}
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
        if isinstance(self.chip, Gpu):
            return int(self.chip.memory * GPU_MEMORY_SHARE * 2**30)
        return int(self.chip.usable * 2**30) if self.chip else None

    def peak(self, name: str) -> float | None:
        """Returns a peak of one device per second, such as ``flops`` or ``hbm``; None for a CPU."""
        return getattr(self.chip, name) / self.chip.devices if self.chip else None


def gpu_target(gpu: Gpu) -> str:
    """Returns XLA's description of a GPU (`GpuTargetConfig`, in text form)."""
    major, minor = gpu.capability.split(".")
    features = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"  # sm_90a: wgmma
    shared = gpu.shared * 2**10
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_core: {shared} shared_memory_per_block: 49152
        shared_memory_per_block_optin: {shared - 1024}
        core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
        memory_bandwidth: {gpu.hbm:.0f} l2_cache_size: {gpu.cache * 2**20}
        device_memory_size: {gpu.memory * 2**30:.0f} device_address_bits: 64
        cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
        runtime_version: "12.9.0" dnn_version: "{CUDNN}"
    }}
    platform_name: "CUDA" device_description_str: "{gpu.name}"
    dnn_version_info {{ major: {CUDNN.split(".", maxsplit=1)[0]} minor: {CUDNN.split(".")[1]} }}"""


def parse(text: str) -> Topology:
    """Returns the topology of that name. Raises ValueError, with the known ones, for any other."""
    if cpu := re.fullmatch(r"cpu:(\d+)", text):
        if not 1 <= int(cpu[1]) <= 1024:
            raise ValueError(f"topology {text}: give 1 to 1024 placeholder devices")
        return Topology(text, int(cpu[1]), None)
    kind = re.split(r"[:\-=]", text)[0]
    if kind in GPUS:
        return _gpus(text, kind)
    if (shape := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)) and shape[1] != "cpu":
        return _shaped(text, shape[1], [int(n) for n in shape[2].split("x")])
    if (cloud := re.fullmatch(r"(\w+)-(\d+)", text)) and cloud[1] != "cpu":
        return _cloud(text, cloud[1], int(cloud[2]))
    _known(kind)
    raise ValueError(
        f"topology {text}: write v5e:16x16, v5p:8x8x8, v5e-256, h100-8, h100:8x8, or cpu:8"
    )


def _gpus(text: str, kind: str) -> Topology:
    number, shape = re.fullmatch(rf"{kind}-(\d+)", text), re.fullmatch(rf"{kind}:(\d+)x(\d+)", text)
    hosts, each = 0, 0
    if number:
        chips = int(number[1])
        hosts, each = (1, chips) if chips <= HOST else (chips // HOST, HOST * (chips % HOST == 0))
    elif shape:
        hosts, each = int(shape[1]), int(shape[2])
    if not (1 <= hosts <= 1024 and 1 <= each <= HOST):
        raise ValueError(
            f"topology {text}: write {kind}-N, N up to {HOST} or a multiple of it, or "
            f"{kind}:HOSTSxGPUS, at most 1024 hosts of at most {HOST} GPUs"
        )
    return Topology(f"{kind}:{hosts}x{each}", hosts * each, GPUS[kind], hosts)


def _known(kind: str) -> str:
    """Returns this package's name of a chip; accepts the cloud's name too."""
    names = {"cpu", *GPUS, *CHIPS, *(name for chip in CHIPS.values() for name in chip.cloud)}
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
