# SPDX-License-Identifier: Apache-2.0
"""Runs the compiler in a subprocess with a time limit, and caches its results on disk.

Does not import jax.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from localglobal_jax.config import schema
from localglobal_jax.profiling.topologies import Topology

CACHE = pathlib.Path("~/.cache/localglobal/plan")
FAILED = "failed.log"  # in the cache: the output of the last compiler that failed
# Lines of the compiler's output that say why it ended. JAX's own last line never does.
TELLING = r"^[\w.]*(Error|Exception|Interrupt)\b|bad_alloc|Check failed|LLVM ERROR|FATAL"
NO_MEMORY = (
    r"MemoryError|bad_alloc|[Oo]ut of memory|[Cc]annot allocate memory|can't start new thread"
    r"|failed to map segment|pthread_create|Resource temporarily unavailable"
)
TELL = 15.0  # seconds between two lines of progress
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", *CUDA_PLUGINS)
# Without a GPU there is no autotuning: Triton's products have no tile sizes and fail; cuBLAS, which
# autotuning mostly chooses, has them. The second flag writes XLA's estimate into every fusion.
GPU_FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_gpu_collect_cost_model_stats=true"
LATENCY_TABLES = ("h100", "h200", "b200")  # of XLA's estimator, which stops at other GPUs
NO_LATENCY_ESTIMATOR = "--xla_gpu_enable_analytical_sol_latency_estimator=false"
# Without the first two, libtpu queries the cloud's metadata server and logs a failure; the type
# need not be that of the target. Without the last one, two compilations cannot run side by side.
LIBTPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
ASIDE = ("checkpoint", "log")  # sections of a run that change no compiled step
NOT_COMPILED = ("cli", "launch")  # packages whose code no compiled step contains
READERS = (
    "hlo.py", "collectives.py", "roofline.py", "gpu_kernels.py", "table.py", "lints.py",
    "search.py",
)  # fmt: skip


class CompilerFailed(RuntimeError):
    """Raised when the compiler ended without a result."""


def measure(
    run: schema.Run, topology: Topology, step: str, *, timeout: float, cache: bool = True
) -> tuple[dict[str, Any], str]:
    """Returns facts (see `compile`) and the compiled program's text, empty where it does not fit.

    Raises ValueError for a run that cannot be compiled, `CompilerFailed` if the compiler crashes or
    takes more than `timeout` seconds.
    """
    check_compiler(topology)
    root = CACHE.expanduser()
    root.mkdir(parents=True, exist_ok=True)
    kept = root / key(run, topology, step)
    if not (cache and (kept / "facts.json").is_file()):
        folder = pathlib.Path(tempfile.mkdtemp(dir=root, prefix="new-"))
        try:
            _compile(run, topology, step, folder, timeout)
            facts, text = read(folder)
            if "error" not in facts:
                shutil.rmtree(kept, ignore_errors=True)
                with contextlib.suppress(OSError):  # another process has written it meanwhile
                    folder.rename(kept)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"compiled before: {kept}", file=sys.stderr)
        facts, text = read(kept)
    if "error" in facts:
        raise ValueError(facts["error"])
    return facts | {"kept": str(kept)}, text


def check_compiler(topology: Topology) -> None:
    """Raises ValueError unless the compiler for the topology is installed and fits jaxlib."""
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology {topology.name} needs the TPU compiler, libtpu, which is not installed: "
            'pip install "localglobal_jax[tpu]" (no TPU is needed). --topology cpu:8 answers the '
            "questions of memory and collectives without it"
        )
    if topology.platform != "cuda":
        return
    plugins = {name: found for name in CUDA_PLUGINS if (found := version(name))}
    if not plugins:
        raise ValueError(
            f"topology {topology.name} needs jax's CUDA plugin, which is not installed: "
            'pip install "localglobal_jax[cuda]" (no GPU and no driver is needed). '
            "--topology cpu:8 answers the questions of memory and collectives without it"
        )
    jaxlib = version("jaxlib")
    if jaxlib not in plugins.values():  # jax ignores a plugin of another version, with a warning
        found = ", ".join(f"{name} {number}" for name, number in plugins.items())
        raise ValueError(
            f"topology {topology.name}: {found} does not fit jaxlib {jaxlib}: "
            'pip install --upgrade "localglobal_jax[cuda]"'
        )


def key(run: schema.Run, topology: Topology, step: str) -> str:
    """Returns the hash of the inputs of a compilation: run, devices, step, versions, sources."""
    files = map(pathlib.Path, run.data.dicts if isinstance(run.data, schema.Text) else ())
    words = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    tree = {k: v for k, v in run.model_dump(mode="json").items() if k not in ASIDE}
    versions = {name: version(name) for name in PACKAGES}
    flags = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "LIBTPU_INIT_ARGS"))}
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR"):
        flags.pop(name, None)  # of `environment`, or without effect on the program
    parts: list[Any] = [tree, topology.name, step, versions, flags, sources(), *words]
    if isinstance(run.data, schema.Images) and run.data.name == "folder" and not run.data.mock:
        from localglobal_jax.data.images import folder  # noqa: PLC0415 # imports TFDS

        with contextlib.suppress(ValueError, OSError):  # compiling reports it
            parts.append(len(folder.classes(run.data.dir, run.data.layout)))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def version(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources() -> str:
    """Digest of the package's files that a compiled step may depend on."""
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        reader = file.parent.name == "profiling" and file.name in READERS
        if name.partition("/")[0] not in NOT_COMPILED and not reader:
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def environment(
    topology: Topology, given: Mapping[str, str], dump: pathlib.Path | None = None
) -> dict[str, str]:
    """Returns the environment of the compiler's process, whose only device is the CPU.

    XLA flags are removed: they are for this process, and `key` does not contain them.
    `dump`: the directory for a program that does not fit.
    """
    found = {**given, "JAX_PLATFORMS": "cpu"}
    found.pop("XLA_FLAGS", None)
    root = str(pathlib.Path(__file__).parent.parent.parent)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, given.get("PYTHONPATH"))))
    if topology.chip is not None:
        flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text" if dump else ""
        if topology.platform == "cuda":
            estimator = "" if topology.name.startswith(LATENCY_TABLES) else NO_LATENCY_ESTIMATOR
            return found | {"XLA_FLAGS": f"{GPU_FLAGS} {estimator} {flags}"}
        return found | LIBTPU | {"XLA_FLAGS": flags}
    return found | {"JAX_NUM_CPU_DEVICES": str(topology.devices)}


def read(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Reads the files of the compiler's process."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    program = folder / "program.txt.gz"
    if not program.is_file():
        return facts, ""
    with gzip.open(program, "rt", encoding="utf-8") as file:
        return facts, file.read()


def _compile(
    run: schema.Run, topology: Topology, step: str, folder: pathlib.Path, timeout: float
) -> None:
    request = {"run": run.model_dump(mode="json"), "topology": topology.name, "step": step}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "localglobal_jax.profiling.compile"]
    started: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def end(number: int, frame: Any) -> None:
        asked.append(number)
        if started:
            sys.exit(143)

    previous = None
    if threading.current_thread() is threading.main_thread():
        # A signal, as from `timeout` or a scheduler, leaves no compiler running. The handler is
        # there before the compiler is, which a signal in between would leave behind.
        previous = signal.signal(signal.SIGTERM, end)
    try:
        with (folder / "log").open("w") as log:
            child = subprocess.Popen(  # nosec B603 # an argument list, no shell
                [*command, str(folder / "request.json"), str(folder)],
                env=environment(topology, os.environ, folder / "dump"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(child)
        if asked:
            sys.exit(143)
        _watch(child, f"the {step} step for {topology.name}", timeout)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(folder / "dump", ignore_errors=True)
    if child.returncode != 0 or not (folder / "facts.json").is_file():
        said = (folder / "log").read_text(encoding="utf-8", errors="replace")
        kept = folder.parent / FAILED
        kept.write_text(said, encoding="utf-8")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 2**10
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        raise CompilerFailed(
            f"the compiler ended with {reason(child.returncode, said, peak, limit)}; topology "
            f"{topology.name}; its output: {kept}"
        )


def reason(code: int, said: str, peak: int, limit: int) -> str:
    """Returns one line on why the compiler's process ended.

    Args:
      code: its exit code; negative: the signal.
      said: its output.
      peak: the bytes of memory that it used.
      limit: the bytes of address space that it may use; -1 without a limit.
    """
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(TELLING, line)] or lines
    if telling:
        how += f": {telling[-1][:300]}"
    limited = limit >= 0 and -code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
    if re.search(NO_MEMORY, said) or -code == signal.SIGKILL or limited:
        how += f" (out of memory? It used {peak / 2**30:.2f} GiB"
        how += f"; ulimit -v: {limit / 2**30:.2f} GiB)" if limit >= 0 else ")"
    return how


def _watch(child: "subprocess.Popen[bytes]", what: str, timeout: float) -> None:
    """Waits for the process and prints the time passed."""
    began = time.monotonic()
    while True:
        gone = time.monotonic() - began
        try:
            child.wait(min(TELL, max(timeout - gone, 0.01)))
            return
        except subprocess.TimeoutExpired:
            gone = time.monotonic() - began
            if gone >= timeout:
                raise CompilerFailed(
                    f"compiling {what} took more than {timeout:g} s: give --timeout SECONDS"
                ) from None
            print(f"compiling {what} ... {gone:.0f} s", file=sys.stderr, flush=True)
