# SPDX-License-Identifier: Apache-2.0
"""Kernels of a program compiled for a GPU: kinds, FLOP, bytes and estimated times. Pure.

Every scheduled instruction is one launch: a fusion, or a call of cuBLAS (a product) or cuDNN (a
convolution, attention). Without a GPU nothing is autotuned, so times are estimates: a product takes
its roofline at 70 % of the peak, a convolution at 50 %, a fusion XLA's own estimate, and every
launch 2 us. None of these shares was measured here.
"""

import dataclasses
import json
import math
import re

from localglobal_jax.parallel.chips import Gpu
from localglobal_jax.profiling.hlo import Array, Instruction, Program

KINDS = {  # of a library call, by the start of its target
    "__cublas": "product",
    "__cudnn$conv": "convolution",
    "__cudnn$fmha": "attention",
}
EFFICIENCY = {"product": 0.7, "convolution": 0.5, "attention": 0.5}
LAUNCH = 2e-6  # seconds
SPEED_OF_LIGHT = "sol"  # a lower bound, not an estimate
VIEWS = ("bitcast", "get-tuple-element")
COPIES = ("copy", "transpose", "copy-start")
COPY_NAMES = re.compile(r"(wrapped_|loop_|input_)?(transpose|copy)(_fusion)?[.\d]*")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective|ragged|async)[\w-]*"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, `runs` times a step. Bytes, FLOP and seconds are of one run."""

    kind: str  # product, convolution, attention, fusion, copy, other
    name: str
    dtype: str  # of the inputs of a product, convolution or attention, else of the result
    nbytes: int
    flops: int  # of products, convolutions and attention
    roofline: float  # seconds by published peaks
    estimate: float  # seconds
    runs: int
    op_name: str
    layout: str = ""  # NHWC or NCHW, of a convolution
    feeds_convolution: bool = False  # a copy of an operand or result of a convolution


def kernels(program: Program, gpu: Gpu) -> list[Kernel]:
    """Returns the kernels of a step, without its collectives."""
    sizes = {id(i): size for i, size, _ in program.traffic()}
    found = []
    for name, runs in program.scheduled.items():
        there = {i.name: i.result[0] for i in program.instructions[name] if i.result}
        around = _around_convolutions(program.instructions[name])
        for i in program.instructions[name]:
            if id(i) in sizes and not COLLECTIVE.fullmatch(i.opcode):
                inputs = [there[operand] for operand in i.operands if operand in there]
                kernel = _kernel(i, inputs, sizes[id(i)], runs, gpu)
                copied = kernel.kind == "copy" and i.name in around
                found.append(dataclasses.replace(kernel, feeds_convolution=copied))
    return found


def _around_convolutions(instructions: list[Instruction]) -> set[str]:
    """Returns the names of instructions that make an operand, or read a result, of a convolution.

    Views (bitcasts, elements of tuples) between them are passed through.
    """
    views = {i.name: i.operands[0] for i in instructions if i.opcode in VIEWS}

    def origin(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    convolutions = {i.name: i for i in instructions if _library_kind(i) == "convolution"}
    makers = {origin(name) for i in convolutions.values() for name in i.operands}
    readers = {i.name for i in instructions if any(origin(n) in convolutions for n in i.operands)}
    return makers | readers


def _library_kind(i: Instruction) -> str | None:
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    return next((kind for start, kind in KINDS.items() if target.startswith(start)), None)


def _kernel(i: Instruction, inputs: list[Array], size: int, runs: int, gpu: Gpu) -> Kernel:
    kind, layout = _library_kind(i), ""
    flops, dtype, peak = 0, i.result[0].dtype if i.result else "", gpu.flops
    if kind == "product":
        flops, dtype = _product_flops(i, inputs), inputs[0].dtype
    elif kind == "convolution":
        flops, dtype = _convolution_flops(i, inputs), inputs[0].dtype
        layout = "NHWC" if _labels(i).endswith("f") else "NCHW"
    elif kind == "attention":
        target = i.attribute(r'custom_call_target="([^"]*)"') or ""
        flops, dtype = _attention_flops(inputs, target), inputs[0].dtype
    elif i.opcode in COPIES or (i.opcode == "fusion" and COPY_NAMES.fullmatch(i.name)):
        kind = "copy"
    elif kind is None:
        kind = "fusion" if i.opcode == "fusion" else "other"
    if dtype in ("f32", "f64"):
        peak = gpu.float32 if "HIGHEST" in i.attributes else gpu.tf32
    roofline = max(flops / peak, size / gpu.hbm)
    share = EFFICIENCY.get(kind, 1.0)
    estimate = max(roofline / share, _estimate(i)) + LAUNCH
    return Kernel(kind, i.name, dtype, size, flops, roofline, estimate, runs, i.op_name, layout)


def _product_flops(i: Instruction, inputs: list[Array]) -> int:
    """Returns 2 x the elements of the result x the contracted length."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    dims = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2 * math.prod(i.result[0].shape) * math.prod(inputs[0].shape[n] for n in dims)


def _labels(i: Instruction) -> str:
    """Returns the axes of a convolution, as ``b01f_o01i->b01f``."""
    return i.attribute(r"dim_labels=(\S+?)[,\s]") or "b01f_01io->b01f"


def _convolution_flops(i: Instruction, inputs: list[Array]) -> int:
    """Returns 2 x the elements of the kernel x the positions of the output, for any direction."""
    channel = _labels(i).rpartition("->")[2].index("f")
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    if "Filter" in target:  # (input, gradient of the output) -> gradient of the kernel
        kernel, output = i.result[0], inputs[1]
    elif "BackwardInput" in target:  # (gradient of the output, kernel) -> gradient of the input
        kernel, output = inputs[1], inputs[0]
    else:
        kernel, output = inputs[1], i.result[0]
    return 2 * math.prod(kernel.shape) * math.prod(output.shape) // output.shape[channel]


def _attention_flops(inputs: list[Array], target: str) -> int:
    """Returns the FLOP of cuDNN's attention: two products forward, and five backward.

    The backward pass computes the weights again. Query and key are [b, l, n, c] and [b, m, n, c].
    """
    query, key = inputs[0].shape, inputs[1].shape
    return (5 if "Backward" in target else 2) * 2 * math.prod(query) * key[1]


def _estimate(i: Instruction) -> float:
    """Returns XLA's own estimate in seconds, the smallest of its models'; 0 where it gives none.

    The general model takes a Triton fusion for a loop that reads its inputs again for each output.
    """
    found = re.search(r'"reification_cost":(\[.*?\])', i.attributes)
    costs = json.loads(found[1]) if found else []
    times = [cost["exec_time_us"] for cost in costs if cost["name"] != SPEED_OF_LIGHT]
    return min(times, default=0.0) * 1e-6


def rows(found: list[Kernel]) -> list[dict[str, object]]:
    """Returns one row per kind: launches, bytes, FLOP, ms by rooflines and as estimated."""
    kinds = sorted({k.kind for k in found})
    made = [
        {
            "kind": kind,
            "count": sum(k.runs for k in found if k.kind == kind),
            "bytes": sum(k.nbytes * k.runs for k in found if k.kind == kind),
            "flops": sum(k.flops * k.runs for k in found if k.kind == kind),
            "roofline_ms": 1e3 * sum(k.roofline * k.runs for k in found if k.kind == kind),
            "estimated_ms": 1e3 * sum(k.estimate * k.runs for k in found if k.kind == kind),
        }
        for kind in kinds
    ]
    return sorted(made, key=lambda row: -float(str(row["estimated_ms"])))
