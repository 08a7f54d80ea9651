# SPDX-License-Identifier: Apache-2.0
"""This machine as slots, each with cores or GPUs of its own; and what an exit code asks for."""

import dataclasses
from collections.abc import Mapping, Sequence

DONE, WRONG, DIVERGED, PREEMPTED = 0, 2, 3, 42


@dataclasses.dataclass(frozen=True)
class Slot:
    """A part of the machine; empty means that it is not restricted."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """What a process in it gets to see."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}

    def __str__(self) -> str:
        parts = [("cores", self.cores), ("GPUs", self.gpus)]
        return ", ".join(f"{what} {','.join(map(str, items))}" for what, items in parts if items)


def slots(
    count: int,
    cores: Sequence[int],
    gpus: Sequence[str] = (),
    *,
    cores_per_slot: int | None = None,
    gpus_per_slot: int | None = None,
) -> list[Slot]:
    """Splits `cores` and `gpus` evenly over `count` slots, or so many to each.

    A GPU is never shared (two processes would ask for its memory); cores are, if they must.
    """
    each = len(gpus) // count if gpus_per_slot is None else gpus_per_slot
    if (gpus and not each and gpus_per_slot is None) or each * count > len(gpus):
        raise ValueError(
            f"{count} slots of {each or 1} GPUs need {max(each, 1) * count}, there are {len(gpus)}:"
            " lower --slots, or use cores alone with --gpus_per_slot 0"
        )
    width = cores_per_slot or max(1, len(cores) // count)
    if width > len(cores):
        raise ValueError(f"--cores_per_slot {width}: this machine gives us {len(cores)}")
    return [
        Slot(
            tuple(sorted(cores[(i * width + j) % len(cores)] for j in range(width))),
            tuple(gpus[i * each : (i + 1) * each]),
        )
        for i in range(count)
    ]


def visible_gpus(environment: Mapping[str, str], device_files: Sequence[str]) -> list[str]:
    """Ids of GPUs: those of CUDA_VISIBLE_DEVICES, else one per ``/dev/nvidia<i>``."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    numbers = sorted(int(f[len("nvidia") :]) for f in device_files if f[len("nvidia") :].isdigit())
    return [str(number) for number in numbers]
