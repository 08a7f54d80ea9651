# SPDX-License-Identifier: Apache-2.0
"""Collectives of a compiled program: bytes by operation, dtype and group. Pure."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from localglobal_jax.profiling.hlo import Instruction, Program

CHANNEL = r"channel_id=(\d+)"
MESH = r"replica_groups=\S*mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}"
# libtpu writes a reduce-scatter as a fusion that calls a computation of this name: an all-reduce
# of which each device keeps a slice. Only the slices are sent.
FUSED_SCATTER = "all-reduce-scatter"
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective sends, once per run of the instruction.

    `payload`: bytes of its result (of all-gather: gathered; of reduce-scatter: scattered). `wire`:
    bytes that a chip sends, if the devices of a group stand in a ring. `count`: how often.
    `devices`: the first group.
    """

    op: str
    key: str  # the same for all arrays of one instruction
    dtype: str
    shape: tuple[int, ...]
    devices: tuple[int, ...]
    payload: int
    wire: float
    count: int
    op_name: str

    @property
    def group(self) -> int:
        """Number of devices in a group."""
        return len(self.devices)

    def network(self, gpus: int) -> float:
        """Returns the bytes that a GPU sends to other hosts of `gpus` GPUs.

        The least there is: data crosses once per host, split over the cards of its GPUs.
        """
        hosts = len({device // gpus for device in self.devices})
        each = self.group // hosts
        if self.op == "reduce-scatter":  # the payload is one device's part
            return wire_bytes(self.op, self.payload, hosts)
        share = 1 if self.op in ("all-to-all", "ragged-all-to-all", "collective-permute") else each
        return wire_bytes(self.op, self.payload, hosts) / share


def collectives(program: Program) -> list[Collective]:
    """Returns all collectives of a step.

    An asynchronous one is in several computations, so only one per channel is counted.
    """
    found: dict[str, list[Collective]] = {}
    callers = program.callers
    for name, i in program.all():
        op = i.opcode.removesuffix("-start")
        if op not in COLLECTIVES or not program.runs[name]:
            continue
        key = f"{op} {i.attribute(CHANNEL) or i.name}"
        if key not in found or found[key][0].count < program.runs[name]:
            caller = callers.get(name)
            op_name = i.op_name or (caller.op_name if caller else "")
            found[key] = list(_arrays(program, name, i, key, op_name))
    return [each for several in found.values() for each in several]


def _arrays(
    program: Program, name: str, i: Instruction, key: str, op_name: str
) -> Iterator[Collective]:
    op = i.opcode.removesuffix("-start")
    inside = program.instructions[name]
    there = {other.name: other for other in inside}
    arrays = [a for a in i.result if a.dtype != "token"]
    if i.opcode.endswith("-start") and op != "all-reduce":  # (operands, results, ...)
        arrays = arrays[len(i.operands) : 2 * len(i.operands)]
    if FUSED_SCATTER in name and op == "all-reduce":
        op, arrays = "reduce-scatter", list(inside[-1].result)
    members = tuple(group(i, program.devices))
    sources = i.operands if len(i.operands) == len(arrays) else [""] * len(arrays)
    for array, source in zip(arrays, sources, strict=True):
        origin = _origin(there, source) if len(arrays) > 1 else ""
        yield Collective(
            op=op,
            key=key,
            dtype=array.dtype,
            shape=array.shape,
            devices=members,
            payload=array.nbytes,
            wire=wire_bytes(op, array.nbytes, len(members)),
            count=program.runs[name],
            op_name=origin or op_name,
        )


def _origin(there: dict[str, Instruction], name: str) -> str:
    """Returns the op_name of the instruction that made an operand."""
    while (found := there.get(name)) is not None:
        if found.op_name or not found.operands:
            return found.op_name
        name = found.operands[0]
    return ""


def group(i: Instruction, devices: int) -> list[int]:
    """Returns the devices of the first group of a collective, in any of XLA's notations."""
    text = i.attributes
    if mesh := re.search(MESH, text):
        return _mesh_group(mesh)
    if table := re.search(r"replica_groups=(\[\d+,\d+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(table[2]).reshape(_numbers(table[1]))[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return _numbers(listed[1])
    if pairs := re.findall(r"\{(\d+),(\d+)\}", i.attribute(r"source_target_pairs=(\S+)") or ""):
        return max(([int(a), int(b)] for a, b in pairs), key=lambda pair: abs(pair[0] - pair[1]))
    return list(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> Any:
    """Returns the device numbers of ``[8,4]T(1,0)``: counted up in that shape, then transposed."""
    import numpy as np  # noqa: PLC0415 # `localglobal --help` imports this module

    shape, _, order = text.partition("T")
    counted = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return counted.transpose(_numbers(order)) if order else counted


def _mesh_group(mesh: re.Match[str]) -> list[int]:
    """Returns the first group over axes, or parts of axes, of a named mesh.

    ``'a':(2)4`` is the middle part, of size 4, of an axis whose first part has size 2.
    """
    import numpy as np  # noqa: PLC0415 # see `_iota`

    axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    count = math.prod(axes.values())
    ids = (_iota(mesh[2]) if mesh[2] else np.arange(count)).reshape(list(axes.values()))
    chosen: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3]):
        chosen[name] = (int(before or 1), int(size or axes[name]))
    window = []
    for name, n in axes.items():
        before, size = chosen.get(name, (1, 1))
        after = n // (before * size)
        window.append(np.arange(size) * after)
    return ids[np.ix_(*window)].reshape(-1).tolist()


def wire_bytes(op: str, payload: int, group: int) -> float:
    """Returns the bytes that each device of a ring sends for a result of `payload` bytes."""
    if group < 2:
        return 0.0
    return payload * {
        "all-reduce": 2 * (group - 1) / group,
        "all-gather": (group - 1) / group,
        "reduce-scatter": group - 1.0,
        "all-to-all": (group - 1) / group,
        "ragged-all-to-all": (group - 1) / group,
    }.get(op, 1.0)
