# SPDX-License-Identifier: Apache-2.0
"""Warnings about the collectives, and on GPU the kernels, of a compiled step. Pure."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.profiling.collectives import Collective
from localglobal_jax.profiling.gpu_kernels import Kernel

SMALL = 64 * 2**10  # bytes; the time of a smaller message is its latency
MANY = 10
SHORT = 2e-6  # seconds of a kernel's roofline
MANY_KERNELS = 100
COPIED = 0.05  # share of the memory traffic
FEW_TIMES = 4  # parameter bytes that a step may send: gathers forward and backward, gradients
LEVELS = ("error", "warning", "notice")


def find(
    facts: Mapping[str, Any], collectives: Sequence[Collective], kernels: Sequence[Kernel] = ()
) -> list[dict[str, str]]:
    """Returns ``{"level", "name", "text"}`` for each warning, the worst first."""
    found = [
        *_whole_batches(facts, collectives),
        *_much(facts, collectives),
        *_tiny(collectives),
        *_gradient_types(facts, collectives),
        *_wide_products(kernels),
        *_short_kernels(kernels),
        *_copies(kernels),
        *_layouts(kernels),
    ]
    return sorted(found, key=lambda lint: LEVELS.index(lint["level"]))


def _lint(level: str, name: str, text: str) -> dict[str, str]:
    return {"level": level, "name": name, "text": text}


def _whole_batches(facts: Mapping[str, Any], collectives: Sequence[Collective]) -> Any:
    """Finds collectives that give every device the rows of all devices.

    Such an array has a dimension of the global batch (or micro-batch), none of one device's share
    of it, and not the size of a parameter. The work on it, or its memory, is not split.
    """
    parts = math.prod(n for axis, n in facts["mesh"].items() if axis != "model")
    if parts == 1:
        return
    whole = {n // m for n in (facts["rows"], facts["items"]) for m in (1, facts["micro_batches"])}
    per_device = {n // parts for n in whole} - whole
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    names: dict[tuple[Any, ...], str] = {}
    for c in collectives:
        shape = set(c.shape)
        if len(c.shape) < 2:  # a bias may be as long as the batch
            continue
        if (
            shape & whole
            and not shape & per_device
            and math.prod(c.shape) not in facts["parameter_sizes"]
        ):
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


def _wide_products(kernels: Sequence[Kernel]) -> Any:
    """Finds float32 products in a run whose other products are bfloat16."""
    products = [k for k in kernels if k.kind in ("product", "convolution")]
    work: dict[str, float] = defaultdict(float)
    for k in products:
        work[k.dtype] += k.flops * k.runs
    if not work["bf16"] or not work["f32"]:
        return
    wide = max((k for k in products if k.dtype == "f32"), key=lambda k: k.flops * k.runs)
    yield _lint(
        "warning" if work["f32"] > work["bf16"] / 100 else "notice",
        "float32 products",
        f"{work['f32'] / 1e9:,.1f} GFLOP of products are in float32, {work['bf16'] / 1e9:,.1f} in "
        f"bfloat16; the largest is from {wide.op_name or wide.name}",
    )


def _short_kernels(kernels: Sequence[Kernel]) -> Any:
    short = sum(k.runs for k in kernels if k.roofline < SHORT)
    if short >= MANY_KERNELS:
        yield _lint(
            "notice",
            "many short kernels",
            f"{short} of {sum(k.runs for k in kernels)} launches have less than 2 us of work, "
            "which is about the cost of a launch",
        )


def _copies(kernels: Sequence[Kernel]) -> Any:
    """Finds copies and transposes that take a good part of the memory traffic."""
    moved = sum(k.nbytes * k.runs for k in kernels if k.kind == "copy")
    whole = sum(k.nbytes * k.runs for k in kernels)
    if moved > COPIED * whole:
        largest = max((k for k in kernels if k.kind == "copy"), key=lambda k: k.nbytes * k.runs)
        yield _lint(
            "warning",
            "copies and transposes",
            f"{moved / 1e9:,.3g} of {whole / 1e9:,.3g} GB are copied or transposed; the largest is "
            f"from {largest.op_name or largest.name}",
        )


def _layouts(kernels: Sequence[Kernel]) -> Any:
    """Finds arrays that are copied into, or out of, the layout of a convolution."""
    convolutions = [k for k in kernels if k.kind == "convolution"]
    copies = [k for k in kernels if k.feeds_convolution]
    read = sum(k.nbytes * k.runs for k in convolutions)
    moved = sum(k.nbytes * k.runs for k in copies)
    if moved > COPIED * read:
        largest = max(copies, key=lambda k: k.nbytes * k.runs)
        layouts = " and ".join(sorted({k.layout for k in convolutions}))
        yield _lint(
            "warning" if moved > COPIED * sum(k.nbytes * k.runs for k in kernels) else "notice",
            "layouts of convolutions",
            f"{moved / 1e9:,.3g} GB are copied or transposed before and after convolutions, which "
            f"read and write {read / 1e9:,.3g} GB in {layouts}; the largest is from "
            f"{largest.op_name or largest.name}",
        )
