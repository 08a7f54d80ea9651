# SPDX-License-Identifier: Apache-2.0
"""Parses the text of a compiled program (XLA's HLO). Pure; independent of models and chips.

Unlike XLA's own cost analysis, it counts the body of a loop as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0}
ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+[a-z0-9]*|c64|c128)\[([\d,]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
HEAD = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
# Opcodes that read and write no memory themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip
WINDOWS = ("dynamic-slice", "slice", "gather")  # read only their result's bytes


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # S(1) and above name the chip's own memories

    @property
    def nbytes(self) -> int:
        """Bytes, without the padding of the chip's layouts."""
        known = BITS.get(self.dtype)
        bits = int(re.findall(r"\d+", self.dtype)[0]) if known is None else known
        return (math.prod(self.shape) * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``%name = result opcode(operands), attributes``."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses: the value of a constant, the number of a param
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of `pattern` in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Path in the source: ``jit(traced)/jvp(CoAtNet)/stage1/block1/norm/reduce_sum``."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate; 0 where it gives none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)


class Program:
    """A parsed module. `instructions`: of each computation, in order."""

    def __init__(self, text: str):
        self.instructions: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line[:1] not in (" ", "", "}") and line.rstrip().endswith("{"):
                found = re.match(r"(ENTRY )?%?([\w.\-]+) ", line)
                if found and "=" not in line.split("(")[0]:
                    current = self.instructions[found[2]] = []
                    self.entry = found[2] if found[1] else self.entry
            elif (head := HEAD.match(line)) is not None:
                current.append(_instruction(head[1], line[head.end() :]))
        if self.entry not in self.instructions:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY")
        self.devices = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])

    @functools.cached_property
    def trips(self) -> dict[str, int | None]:
        """Trip count of each loop, by the name of its body; None if unknown."""
        return {_called(i, "body"): self._trips(i) for _, i in self.all() if i.opcode == "while"}

    def _trips(self, loop: Instruction) -> int | None:
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        # jax compares a counter that starts at 0 with a constant, alone in the condition; a
        # condition with more than that (rejection sampling, "until all are done") has a bound at
        # most, and with no constant it has none.
        limits = {
            int(i.inside)
            for name in self._below(_called(loop, "condition"))
            for i in self.instructions[name]
            if i.opcode == "constant" and i.result[0].dtype in ("s32", "u32", "s64", "u64")
            and i.result[0].shape == () and i.inside.isdigit()
        }  # fmt: skip
        return max(limits) if limits else None

    def _below(self, name: str) -> Iterator[str]:
        yield name
        for instruction in self.instructions[name]:
            for called in self._calls(instruction):
                yield from self._below(called)

    def _calls(self, instruction: Instruction) -> list[str]:
        found = []
        for one, several in CALLS.findall(instruction.attributes):
            found += [one] if one else NAME.findall(several)
        return [name for name in found if name in self.instructions]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """Runs of each computation in one step; a loop of unknown length counts once."""
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            seen.add(name)
            for instruction in self.instructions[name]:
                for called in self._calls(instruction):
                    if called not in seen:
                        visit(called)
            order.append(name)

        visit(self.entry)
        runs = dict.fromkeys(self.instructions, 0)
        runs[self.entry] = 1
        for name in reversed(order):  # callers before those they call
            for instruction in self.instructions[name]:
                times = 1
                if instruction.opcode == "while":
                    times = self.trips[_called(instruction, "body")] or 1
                for called in self._calls(instruction):
                    runs[called] += runs[name] * times
        return runs

    @functools.cached_property
    def callers(self) -> dict[str, Instruction]:
        """An instruction that calls each computation."""
        return {called: i for _, i in self.all() for called in self._calls(i)}

    @functools.cached_property
    def scheduled(self) -> dict[str, int]:
        """Runs of each computation whose instructions run one by one (not inside a fusion)."""
        found: dict[str, int] = {}

        def visit(name: str) -> None:
            if name in found:
                return
            found[name] = self.runs[name]
            for i in self.instructions[name]:
                if i.opcode in ("while", "conditional", "call"):
                    for called in self._calls(i):
                        visit(called)

        visit(self.entry)
        return found

    def all(self) -> Iterator[tuple[str, Instruction]]:
        """Yields every instruction, with the name of its computation."""
        for name, instructions in self.instructions.items():
            for instruction in instructions:
                yield name, instruction

    def traffic(self) -> Iterator[tuple[Instruction, int, int]]:
        """Yields every scheduled instruction, its bytes in main memory, and its number of runs.

        Counts operands and results in main memory. An operand that a fusion only slices counts as
        its slices, a result that is updated in place as its update. Repeated reads of a fusion and
        the padding of layouts are not counted.
        """
        for name, runs in self.scheduled.items():
            there = {i.name: i for i in self.instructions[name]}
            for i in self.instructions[name]:
                if i.opcode not in FREE and not i.opcode.endswith("-done"):
                    yield i, self._bytes(i, there), runs

    def _bytes(self, i: Instruction, there: dict[str, Instruction]) -> int:
        if i.opcode == "slice-start":  # (operand, slice, ...)
            return sum(a.nbytes * (1 + a.in_hbm) for a in i.result[1:2])
        if i.opcode.endswith("-start"):  # its result names its operands too
            return sum(a.nbytes for a in i.result if a.in_hbm)
        result = i.result
        if i.opcode == "custom-call" and len(result) > 1 and result[-1].dtype in ("s8", "u8"):
            result = result[:-1]  # the workspace of cuBLAS or cuDNN
        written = sum(a.nbytes for a in result if a.in_hbm)
        operands = [there.get(name) for name in i.operands]
        reads = [sum(a.nbytes for a in o.result if a.in_hbm) if o else 0 for o in operands]
        if i.opcode in WINDOWS:
            return 2 * written + sum(reads[1:])
        if i.opcode == "dynamic-update-slice":
            return 2 * reads[1]
        if i.opcode == "fusion":
            (called,) = self._calls(i)[:1] or [""]
            for number, window in self._windows(called).items():
                if number < len(reads) and reads[number]:
                    reads[number] = min(reads[number], window)
            for number, size in self._updates(called).items():
                if number < len(reads) and 0 < reads[number] <= written:
                    written += 2 * min(size, reads[number]) - reads[number]
                    reads[number] = 0
        return written + sum(reads)

    def _windows(self, fused: str) -> dict[int, int]:
        """Returns bytes of slices by number of each parameter of a fusion that is only sliced."""
        inside = self.instructions.get(fused, [])
        users: dict[str, list[Instruction]] = {}
        for i in inside:
            for operand in set(i.operands):
                users.setdefault(operand, []).append(i)

        def sliced(name: str) -> int | None:
            """Returns the bytes that are read of an array; None: perhaps all."""
            total = 0
            for user in users.get(name, []):
                places = [n for n, operand in enumerate(user.operands) if operand == name]
                if user.opcode in WINDOWS and places == [0]:
                    read: int | None = sum(a.nbytes for a in user.result)
                elif user.opcode == "bitcast":
                    read = sliced(user.name)
                elif user.opcode == "fusion":  # fusions hold fusions
                    (called,) = self._calls(user)[:1] or [""]
                    parts = self._windows(called)
                    read = sum(parts[n] for n in places) if parts.keys() >= set(places) else None
                else:
                    read = None
                if read is None:
                    return None
                total += read
            return total or None

        sizes = {int(i.inside): sliced(i.name) for i in inside if i.opcode == "parameter"}
        return {number: size for number, size in sizes.items() if size is not None}

    def _updates(self, fused: str) -> dict[int, int]:
        """Returns bytes of the update by number of each parameter that a fusion updates in place.

        The updates are the fusion's results, or those of a fusion inside it.
        """
        inside = self.instructions.get(fused, [])
        there = {i.name: i for i in inside}

        def source(name: str) -> Instruction:
            while there[name].opcode == "bitcast":
                name = there[name].operands[0]
            return there[name]

        found: dict[int, int] = {}
        roots = inside[-1:]
        if roots and roots[0].opcode == "tuple":
            roots = [there[name] for name in roots[0].operands]
        for root in roots:
            last = source(root.name)
            updates: list[tuple[str, int]] = []
            if last.opcode == "dynamic-update-slice":
                target, update = last.operands[:2]
                updates = [(target, sum(a.nbytes for a in there[update].result))]
            elif last.opcode == "fusion":
                (called,) = self._calls(last)[:1] or [""]
                updates = [(last.operands[n], size) for n, size in self._updates(called).items()]
            for name, size in updates:
                target_of = source(name)
                if target_of.opcode == "parameter":
                    found[int(target_of.inside)] = size
        return found


def _instruction(name: str, rest: str) -> Instruction:
    end = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    at = rest.index("(")
    close = _close(rest, at)
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in (layout or ""))
        for dtype, shape, layout in ARRAY.findall(kind)
    )
    inside = rest[at + 1 : close]
    return Instruction(
        name, rest[:at], arrays, tuple(NAME.findall(inside)), inside, rest[close + 1 :]
    )


def _close(text: str, at: int) -> int:
    """Returns the position of the parenthesis that closes the one at `at`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, at):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _called(instruction: Instruction, role: str) -> str:
    return instruction.attribute(rf"\b{role}=%?([\w.\-]+)") or ""
