# SPDX-License-Identifier: Apache-2.0
"""Collectives of a compiled program: bytes by operation, dtype and group. Pure."""

import dataclasses
import re
from collections.abc import Iterator

from localglobal_jax.profiling.hlo import Instruction, Program

CHANNEL = r"channel_id=(\d+)"
MESH = r"replica_groups=\S*mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}"
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
    """

    op: str
    key: str  # the same for all arrays of one instruction
    dtype: str
    shape: tuple[int, ...]
    group: int
    payload: int
    wire: float
    count: int
    op_name: str


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
    group = group_size(i, program.devices)
    sources = i.operands if len(i.operands) == len(arrays) else [""] * len(arrays)
    for array, source in zip(arrays, sources, strict=True):
        own = _origin(there, source) if len(arrays) > 1 else ""
        yield Collective(
            op=op,
            key=key,
            dtype=array.dtype,
            shape=array.shape,
            group=group,
            payload=array.nbytes,
            wire=wire_bytes(op, array.nbytes, group),
            count=program.runs[name],
            op_name=own or op_name,
        )


def _origin(there: dict[str, Instruction], name: str) -> str:
    """Returns the op_name of the instruction that made an operand."""
    while (found := there.get(name)) is not None:
        if found.op_name or not found.operands:
            return found.op_name
        name = found.operands[0]
    return ""


def group_size(i: Instruction, devices: int) -> int:
    """Returns the number of devices in one group of a collective."""
    text = i.attributes
    if mesh := re.search(MESH, text):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        count = 1
        for axis, parts in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]):
            count *= int(parts) if parts else sizes[axis]
        return count
    if table := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(table[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs=" in text else devices


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
