# SPDX-License-Identifier: Apache-2.0
"""Compiles one step of a run for a topology and writes its facts; runs in a subprocess.

``python -m localglobal_jax.profiling.compile REQUEST.json DIRECTORY``. The request names the run,
the topology and the step; the directory gets ``facts.json`` and the compiled program's text. A
separate process, because libtpu aborts instead of raising, and because XLA reads its environment
once.
"""

import dataclasses
import gzip
import json
import math
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies as descriptions
from jaxtyping import PyTree

from localglobal_jax.config import schema, validation
from localglobal_jax.inference import decoding
from localglobal_jax.models import flops
from localglobal_jax.parallel import placement
from localglobal_jax.profiling import abstract_task, perfect_fusion, topologies
from localglobal_jax.training import freezing, optim
from localglobal_jax.training.step import State, check_batches, init_state, make_update
from localglobal_jax.training.tasks import Task

OUT_OF_MEMORY = r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)"
TOO_MUCH_TEMPORARY = (
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(request: str, directory: str) -> None:
    """Writes ``facts.json``; a ValueError goes into its field ``error``."""
    given = json.loads(pathlib.Path(request).read_text(encoding="utf-8"))
    folder = pathlib.Path(directory)
    run, topology = validation.check(given["run"]), topologies.parse(given["topology"])
    try:
        found = compile_step(run, topology, given["step"], folder)
    except ValueError as error:
        found = {"error": str(error)}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["compile_cpu_seconds"] = usage.ru_utime + usage.ru_stime
    found["compile_peak_bytes"] = usage.ru_maxrss * 1024
    (folder / "facts.json").write_text(json.dumps(found), encoding="utf-8")


def compile_step(
    run: schema.Run, topology: topologies.Topology, step: str, folder: pathlib.Path
) -> dict[str, Any]:
    """Returns facts on memory and work, and writes the program's text.

    Raises ValueError for a run or a topology that cannot be compiled."""
    if run.parallel.compile == "pmap":
        raise ValueError(
            "plan compiles with jit: set parallel.compile=jit (pmap keeps everything on every "
            "device, which is strategy=replicate)"
        )
    partitioner = placement.Partitioner(run.parallel, devices_of(topology))
    check_batches(run, partitioner)
    task = abstract_task.create(run)
    optimizer = optim.make_optimizer(run.optim, run.steps)
    state = partitioner.template(jax.eval_shape(lambda: init_state(task, optimizer, run)))
    batch, described = abstract_task.batch(run, task, train=step == "train")
    loops = None
    if step == "train":
        update: Callable[..., Any] = make_update(task, optimizer, run)
        function: Any = partitioner.compile_step(update, state)
        args: tuple[Any, ...] = (state, batch)
    else:
        update = evaluated(run, task, step)
        function = partitioner.compile_eval(update)
        args = (state.average or state.variables, partitioner.split(batch))
    if step == "decode":
        loops = decoding.max_length(batch["source"].shape[1])  # of the search, at most

    began = time.monotonic()
    traced = function.trace(*args)
    multiply_adds = flops.computed(traced.jaxpr, loops=loops)
    facts: dict[str, Any] = {
        "batch": described,
        "items": abstract_task.items(batch),
        "items_name": task.items,
        "rows": next(iter(batch.values())).shape[0],
        "micro_batches": run.optim.accumulate if step == "train" else 1,
        "mesh": dict(partitioner.mesh.shape),
        "parameters": sum(x.size for x in jax.tree.leaves(state.variables["params"])),
        "parameter_bytes": nbytes(state.variables["params"]),
        "split_parameter_bytes": split_bytes(state.variables["params"]),
        "trained_parameter_bytes": nbytes(
            freezing.trained(state.variables["params"], run.optim.freeze)
        ),
        "multiply_adds": multiply_adds,
        "model_multiply_adds": multiply_adds if loops else flops.multiply_adds(update, *args),
        "arguments": arguments(state, batch, partitioner, train=step == "train"),
        "least": least(run, task, step, state, batch),
        "parts": sorted(state.variables["params"]),
        "parameter_sizes": parameter_sizes(state.variables["params"]),
        "trace_seconds": time.monotonic() - began,
    }
    print("traced", flush=True)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or topology.platform != "tpu":
            raise  # on other platforms it is the compiler itself that has no memory left
        for file in (folder / "dump").glob("*oom_intermediate_module.txt"):
            keep(folder, file.read_text(encoding="utf-8"))
        return facts | {"out_of_memory": out_of_memory(str(error))}
    keep(folder, compiled.as_text())
    return facts | {"memory": memory(compiled), "compile_seconds": time.monotonic() - began}


def keep(folder: pathlib.Path, program: str) -> None:
    """Writes the text of a program."""
    with gzip.open(folder / "program.txt.gz", "wt", encoding="utf-8") as file:
        file.write(program)


def devices_of(topology: topologies.Topology) -> list[jax.Device] | None:
    """Returns the devices to compile for, without the hardware; None for this machine's."""
    if topology.chip is None:
        return None
    name = topology.name if topology.platform == "tpu" else ""
    try:
        described = descriptions.get_topology_desc(name, topology.platform, **topology.options)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ValueError(
            f"the compiler of {topology.platform} cannot describe {topology.name}: {error}"
        ) from error
    return list(described.devices)


def evaluated(run: schema.Run, task: Task, step: str) -> Callable[..., Any]:
    """Returns the function of ``--step eval`` or ``decode``, of variables and a batch."""
    if not task.evaluators:
        raise ValueError(f"data.eval_splits=() has nothing for --step {step}: give a split")
    evaluator = next(iter(task.evaluators.values()))
    if step == "eval":
        return evaluator.metrics
    if evaluator.predict is None:
        raise ValueError(
            f"--step decode: {run.task.name} with these options has no predictions; "
            "translation with task.beam > 0 does"
        )
    return evaluator.predict


def least(
    run: schema.Run, task: Task, step: str, state: State, batch: abstract_task.Shapes
) -> dict[str, int] | None:
    """Returns the work that no fusion saves; None for decoding, whose length the data decides."""
    if step == "decode":
        return None
    if step == "train":
        freeze = run.optim.freeze
        found = perfect_fusion.of_training(task, state.variables, batch, freeze)
    else:
        found = perfect_fusion.of_evaluation(evaluated(run, task, step), state.variables, batch)
    return dataclasses.asdict(found)


def arguments(
    state: State, batch: abstract_task.Shapes, partitioner: placement.Partitioner, *, train: bool
) -> dict[str, int]:
    """Returns the bytes per device of each argument of the step, without the chip's padding."""
    others = {k: v for k, v in state.variables.items() if k != "params"}
    given = {"parameters": state.variables["params"], "other variables": others}
    if train:
        given |= {"optimizer": state.optimizer, "average": state.average}
    sizes = {name: own_bytes(tree) for name, tree in given.items()}
    return sizes | {"batch": own_bytes(partitioner.split(batch))}


def own_bytes(tree: PyTree) -> int:
    """Returns the bytes of arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def nbytes(tree: PyTree) -> int:
    """Returns the bytes of whole arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def split_bytes(tree: PyTree) -> int:
    """Returns the bytes of the whole arrays that a sharding splits over devices."""
    return nbytes([x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated])


def parameter_sizes(params: PyTree) -> list[int]:
    """Returns the numbers of elements of parameters, whole and per shard."""
    leaves = jax.tree.leaves(params)
    shards = {math.prod(x.sharding.shard_shape(x.shape)) for x in leaves}
    return sorted({x.size for x in leaves} | shards)


def memory(compiled: Any) -> dict[str, int]:
    """Returns the compiler's account of one device's memory, in bytes."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "output": found.output_size_in_bytes,
        "alias": found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "peak": getattr(found, "peak_memory_in_bytes", 0),
    }


def out_of_memory(message: str) -> dict[str, Any]:
    """Parses needed and available bytes from the compiler's message, which has two forms."""
    found: dict[str, Any] = {"message": "\n".join(message.splitlines()[:40])}
    for name, pattern in (("needed", OUT_OF_MEMORY), ("temporary", TOO_MUCH_TEMPORARY)):
        if (sizes := re.search(pattern, message)) is not None:
            needed, unit, there, there_unit = sizes.groups()
            found[name] = int(float(needed) * UNITS[unit])
            found["usable"] = int(float(there) * UNITS[there_unit])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
