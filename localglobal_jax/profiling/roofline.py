# SPDX-License-Identifier: Apache-2.0
"""Memory, time bounds and collectives of a compiled step, as one dict of numbers. Pure."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from localglobal_jax.parallel.chips import Gpu
from localglobal_jax.profiling import collectives, gpu_kernels, hlo, lints
from localglobal_jax.profiling.collectives import Collective
from localglobal_jax.profiling.topologies import Topology

WRAPPERS = re.compile(r"while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun")
SUBMODULE = re.compile(r"[a-z]\w*\*?")  # of a loop over blocks: block*
MODEL = re.compile(r"(?:^|[/(])[A-Z]\w*[./)]")  # the class of the model: jvp(CoAtNet)/, CoAtNet/
NOT_VALIDATED = "the compiler's estimate, not validated on hardware"


def build(facts: Mapping[str, Any], text: str, topology: Topology) -> dict[str, Any]:
    """Returns the report on one compiled step: bytes, FLOP and ms of one device.

    `facts` are those of `compile`. A program that does not fit has at most the text of the attempt:
    its report has collectives and the largest arrays, but no times.
    """
    report: dict[str, Any] = {
        "topology": topology.name,
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": facts["mesh"],
        "batch": facts["batch"],
        "items": facts["items"],
        "items_name": facts["items_name"],
        "parameters": facts["parameters"],
        "parameters_split": facts["split_parameter_bytes"] / facts["parameter_bytes"],
        "memory": memory(facts, topology),
        "flops": 2 * facts["multiply_adds"] / topology.devices,
        "model_flops": 2 * facts["model_multiply_adds"] / topology.devices,
        "compile": {
            "cpu_seconds": facts["compile_cpu_seconds"],
            "peak_bytes": facts["compile_peak_bytes"],
            "kept": facts.get("kept"),
        },
    }
    report["fits"] = report["memory"]["fits"]
    if facts["least"] is not None:
        report["perfect_fusion"] = perfect_fusion(facts, topology)
    if not text:
        return report
    program = hlo.Program(text)
    sent = collectives.collectives(program)
    traffic: list[tuple[str, int, float]] = [
        (i.op_name, size * runs, i.cycles * runs) for i, size, runs in program.traffic()
    ]
    launched: list[gpu_kernels.Kernel] = []
    if isinstance(topology.chip, Gpu):
        launched = gpu_kernels.kernels(program, topology.chip)
        traffic = [(k.op_name, k.nbytes * k.runs, 1e9 * k.estimate * k.runs) for k in launched]
        report["kernels"] = gpu_kernels.rows(launched)
        report["network_bytes"] = sum(
            c.network(topology.chips // topology.hosts) * c.count for c in sent
        )
    else:
        report["estimated_cycles"] = sum(cycles for *_, cycles in traffic)
    report["bytes_accessed"] = sum(size for _, size, _ in traffic)
    report["wire_bytes"] = sum(c.wire * c.count for c in sent)
    report["loops_of_unknown_length"] = sum(n is None for n in program.trips.values())
    report["collectives"] = grouped(sent, facts["parts"])
    report["layers"] = layers(traffic, facts["parts"])
    report["lints"] = lints.find(facts, sent, launched)
    report["arrays"] = arrays(program, facts["parts"])
    return report | (bounds(report, topology) if "memory" in facts else {})


def memory(facts: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """Returns the memory used on one device, and its capacity for a program.

    `parameters`, `optimizer` and so on are counted from shapes and shardings; `arguments`,
    `temporary` (activations and workspace) and `code` are the compiler's account, with the padding
    of its layouts.
    """
    split = facts["arguments"]
    usable = topology.usable_bytes
    found: dict[str, Any] = {"split": split, "usable": usable, "fits": None}
    if (failed := facts.get("out_of_memory")) is not None:
        usable = failed.get("usable", usable)
        needed = failed.get("needed")
        if "temporary" in failed:
            needed = failed["temporary"] + sum(split.values())
        return found | {"fits": False, "needed": needed, "usable": usable}
    compiled = facts["memory"]
    kept = compiled["arguments"] + compiled["output"] - compiled["alias"]
    needed = max(kept + compiled["temporary"] + compiled["code"], compiled["peak"])
    found |= {
        "arguments": compiled["arguments"],
        "padding": compiled["arguments"] - sum(split.values()),
        "output": compiled["output"] - compiled["alias"],
        "temporary": compiled["temporary"],
        "code": compiled["code"],
        "needed": needed,
    }
    return found | {"fits": None if usable is None else needed <= usable}


def bounds(report: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """Returns lower bounds of the step time from published peaks, and a bracket for it.

    The lower end is the largest of the bounds of compute, memory and communication, which may
    overlap perfectly. The upper end is the compiler's estimate without overlap plus communication:
    cycles on TPU, times of kernels on GPU (see `gpu_kernels`). The MFU counts the work of the
    model, not what the program repeats.
    """
    if topology.chip is None:
        return {}
    amounts = {"compute": (report["flops"], "flops"), "memory": (report["bytes_accessed"], "hbm")}
    if isinstance(topology.chip, Gpu):
        amounts["nvlink"] = report["wire_bytes"], "nvlink"
        amounts["network"] = report["network_bytes"], "network"
        estimated = sum(row["estimated_ms"] for row in report["kernels"])
    else:
        amounts["communication"] = report["wire_bytes"], "ici"
        estimated = 1e3 * report["estimated_cycles"] / (topology.chip.clock or math.inf)
    ms = {name: 1e3 * n / (topology.peak(peak) or 1) for name, (n, peak) in amounts.items()}
    low = max(ms.values())
    sending = max(value for name, value in ms.items() if name not in ("compute", "memory"))
    high = max(low, estimated + sending) if estimated else None
    found: dict[str, Any] = {"bounds_ms": ms, "bound_by": max(ms, key=lambda name: ms[name])}
    step = [low, high]
    least = ms["compute"] * report["model_flops"] / report["flops"]
    found["step_ms"] = {"low": low, "high": high, "note": NOT_VALIDATED}
    found["items_per_second"] = {
        "high": report["items"] / low * 1e3,
        "low": report["items"] / high * 1e3 if high else None,
    }
    found["mfu"] = dict(zip(("high", "low"), (least / n if n else None for n in step), strict=True))
    return found


def perfect_fusion(facts: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """Returns FLOP, bytes and the lower bound of the step's time if everything were fused.

    Bytes of one device: parameters, optimizer and average are read and, in training, written; the
    batch is read; the arrays that the backward pass needs are written and read. See the module
    `perfect_fusion`. `bound_ms` is missing for CPU devices.
    """
    least = facts["least"]
    split: dict[str, int] = facts["arguments"]
    written = dict.fromkeys(split, 0)
    if "optimizer" in split:  # in training
        trained = facts["trained_parameter_bytes"] / facts["parameter_bytes"]
        written = {**split, "batch": 0, "parameters": int(trained * split["parameters"])}
    parts = {name: size + written[name] for name, size in split.items()}
    parts["activations"] = 2 * least["kept"] // topology.devices
    flops, nbytes = 2 * least["multiply_adds"] / topology.devices, sum(parts.values())
    found = {"flops": flops, "bytes": nbytes, "split": parts}
    compute, memory = topology.peak("flops"), topology.peak("hbm")
    if compute is None or memory is None:
        return found
    ms = {"compute": 1e3 * flops / compute, "memory": 1e3 * nbytes / memory}
    return found | {"bounds_ms": ms, "bound_ms": max(ms.values())}


def layer_of(op_name: str, parts: Sequence[str]) -> tuple[str, str]:
    """Returns ``("stage3/block*/attention", "backward")`` for an op_name.

    The blocks of a stage are one layer. `parts`: the model's top-level modules. Operations of the
    model outside of them are "(model)", other differentiated ones "(loss)"; the rest is the
    optimizer, in training. Operations that `remat` repeats are "recomputed".
    """
    before, several, after = op_name.partition("/(")  # prefix/(one:another) names a fusion of both
    op_name = f"{before}/{after.split(':')[0]}" if several else op_name
    way = "backward" if "transpose(" in op_name else "forward"
    way = "recomputed" if "rematted_computation" in op_name else way
    # Methods but `__call__` have their name behind that of the module: decoder.step/layer1.step.
    words = [word.split(".")[0] for word in op_name.split("/")[:-1]]
    if not (starts := [n for n, word in enumerate(words) if word in parts]):
        if MODEL.search(op_name):
            return "(model)", way
        return ("(loss)", way) if "jvp(" in op_name else ("(outside the model)", "")
    inside: list[str] = []
    for word in words[starts[-1] :]:
        if word.startswith("jit("):  # a function of jax.numpy: the names behind it are its own
            break
        submodule = SUBMODULE.fullmatch(word) and not WRAPPERS.fullmatch(word)
        if submodule and word not in inside[-1:]:
            inside.append(word)
    return "/".join([inside[0], *(re.sub(r"\d+$", "*", word) for word in inside[1:3])]), way


def grouped(sent: Sequence[Collective], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row per (op, dtype, group size, layer, pass), the largest first.

    XLA sends many arrays in one message: `count` is the number of messages with arrays of a row.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    keys: dict[tuple[Any, ...], dict[str, int]] = defaultdict(dict)
    for c in sent:
        layer, way = layer_of(c.op_name, parts)
        at = (c.op, c.dtype, c.group, layer, way)
        row = rows.setdefault(
            at,
            {"op": c.op, "dtype": c.dtype, "group": c.group, "layer": layer, "pass": way}
            | {"count": 0, "payload": 0, "wire": 0.0},
        )
        keys[at][c.key] = c.count
        row["payload"] += c.payload * c.count
        row["wire"] += c.wire * c.count
    for at, row in rows.items():
        row["count"] = sum(keys[at].values())
    return sorted(rows.values(), key=lambda row: -row["wire"])


def layers(traffic: Sequence[tuple[str, int, float]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Returns each layer's shares of the estimated time and of bytes in main memory.

    `traffic`: op_name, bytes and cost (cycles on TPU, nanoseconds on GPU) of each instruction. The
    largest share is first.
    """
    cycles: dict[tuple[str, str], float] = defaultdict(float)
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for op_name, size, n in traffic:
        at = layer_of(op_name, parts) if op_name else ("(moved by the compiler)", "")
        cycles[at] += n
        sizes[at] += size
    all_cycles, all_bytes = sum(cycles.values()), sum(sizes.values())
    rows = [
        {
            "layer": at[0],
            "pass": at[1],
            "cycles_share": cycles[at] / all_cycles if all_cycles else None,
            "bytes_share": sizes[at] / max(all_bytes, 1),
        }
        for at in sizes
    ]
    return sorted(rows, key=lambda row: -(row["cycles_share"] or row["bytes_share"]))


def arrays(program: hlo.Program, parts: Sequence[str], most: int = 8) -> list[dict[str, Any]]:
    """Returns the largest results in main memory, each dtype and shape once."""
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for i, *_ in program.traffic():
        for a in i.result if not i.opcode.endswith("-start") else ():
            layer, way = layer_of(i.op_name, parts) if i.op_name else ("", "")
            row = {"bytes": a.nbytes, "dtype": a.dtype, "shape": a.shape, "op": i.opcode}
            old = found.get((a.dtype, a.shape))
            if a.in_hbm and (old is None or not old["layer"]):
                found[a.dtype, a.shape] = {**row, "layer": layer, "pass": way}
    return sorted(found.values(), key=lambda row: -row["bytes"])[:most]


def totals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums rows of collectives by (op, dtype, group)."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        at = (row["op"], row["dtype"], row["group"])
        names = dict(zip(("op", "dtype", "group"), at, strict=True))
        total = found.setdefault(at, {**names, "payload": 0, "wire": 0.0})
        total["payload"] += row["payload"]
        total["wire"] += row["wire"]
    return sorted(found.values(), key=lambda row: -row["wire"])
