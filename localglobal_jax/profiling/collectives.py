# SPDX-License-Identifier: Apache-2.0
"""Collectives of a compiled program: bytes by operation, dtype and group. Pure."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    """All of a step. The same one shows in several computations when it is asynchronous, so
    that of one channel only one is counted."""
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
    """The op_name of what made an operand."""
    while (found := there.get(name)) is not None:
        if found.op_name or not found.operands:
            return found.op_name
        name = found.operands[0]
    return ""


def group_size(i: Instruction, devices: int) -> int:
    """Devices that take part in one group of a collective."""
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
    """Bytes that each device of a ring sends for a result of `payload` bytes."""
    if group < 2:
        return 0.0
    return payload * {
        "all-reduce": 2 * (group - 1) / group,
        "all-gather": (group - 1) / group,
        "reduce-scatter": group - 1.0,
        "all-to-all": (group - 1) / group,
        "ragged-all-to-all": (group - 1) / group,
    }.get(op, 1.0)


SMALL = 64 * 2**10  # bytes below which a message costs its latency
MANY = 10
FEW_TIMES = 4  # parameter bytes that a step may send: gathers forward and backward, gradients
LEVELS = ("error", "warning", "notice")


def find(facts: Mapping[str, Any], collectives: Sequence[Collective]) -> list[dict[str, str]]:
    """``{"level", "name", "text"}`` each, the worst first."""
    found = [
        *_whole_batches(facts, collectives),
        *_much(facts, collectives),
        *_tiny(collectives),
        *_gradient_types(facts, collectives),
    ]
    return sorted(found, key=lambda lint: LEVELS.index(lint["level"]))


def _lint(level: str, name: str, text: str) -> dict[str, str]:
    return {"level": level, "name": name, "text": text}


def _whole_batches(facts: Mapping[str, Any], collectives: Sequence[Collective]) -> Any:
    """A device that receives rows of all devices does work, or holds memory, that is not split.

    Known by a dimension as long as the batch (or micro-batch) of all devices, beside none as long
    as one device's share of it, in what has no parameter's size.
    """
    parts = math.prod(n for axis, n in facts["mesh"].items() if axis != "model")
    if parts == 1:
        return
    whole = {n // m for n in (facts["rows"], facts["items"]) for m in (1, facts["micro_batches"])}
    own = {n // parts for n in whole} - whole
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    names: dict[tuple[Any, ...], str] = {}
    for c in collectives:
        shape = set(c.shape)
        if len(c.shape) < 2:  # a bias may be as long as the batch
            continue
        if shape & whole and not shape & own and math.prod(c.shape) not in facts["parameter_sizes"]:
            at = (c.op, c.dtype, c.shape)
            seen[at] += c.payload * c.count
            names.setdefault(at, c.op_name or "nowhere")
    for (op, dtype, sizes), size in sorted(seen.items(), key=lambda item: -item[1]):
        yield _lint(
            "error" if size >= SMALL else "warning",
            "global batch in a collective",
            f"{op} of {dtype}{list(sizes)} ({size / 1e6:.3g} MB a step), from "
            f"{names[op, dtype, sizes]}: every device gets the rows of all",
        )


def _much(facts: Mapping[str, Any], collectives: Sequence[Collective]) -> Any:
    wire = sum(c.wire * c.count for c in collectives)
    if wire > FEW_TIMES * facts["parameter_bytes"]:
        yield _lint(
            "warning",
            "much is sent",
            f"a device sends {wire / 1e6:,.0f} MB a step, {wire / facts['parameter_bytes']:.1f} "
            "times the size of all parameters; activations may travel because they are not "
            "constrained, or because this strategy sends them (tensor)",
        )


def _tiny(collectives: Sequence[Collective]) -> Any:
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = {}
    for c in collectives:
        if c.op == "all-reduce":
            sizes[c.key] += c.payload
            counts[c.key] = c.count
    tiny = [key for key, size in sizes.items() if size < SMALL]
    if (number := sum(counts[key] for key in tiny)) >= MANY:
        yield _lint(
            "notice",
            "many small all-reduces",
            f"{number} all-reduces of less than 64 KiB, each of which costs its latency: gradients "
            "of small parameters, and statistics of BatchNorm over the global batch, one each",
        )


def _gradient_types(facts: Mapping[str, Any], collectives: Sequence[Collective]) -> Any:
    sizes: dict[str, int] = defaultdict(int)
    for c in collectives:
        summed = c.op in ("all-reduce", "reduce-scatter") and "transpose(" in c.op_name
        if summed and math.prod(c.shape) in facts["parameter_sizes"]:
            sizes[c.dtype] += c.payload * c.count
    if sizes:
        types = ", ".join(f"{n / 1e6:,.1f} MB in {t}" for t, n in sorted(sizes.items()))
        yield _lint(
            "notice", "type of the gradient's sum", f"gradients are summed over devices: {types}"
        )
