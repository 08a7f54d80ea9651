# SPDX-License-Identifier: Apache-2.0
"""``localglobal plan``, which starts the compiler's process; eight CPU devices."""

import gzip
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.profiling import (
    collectives,
    compile,
    compiler_process,
    hlo,
    roofline,
    topologies,
)

DIGITS = "configs/coatnet_digits.py:size=tiny"
MUSE = "configs/muse_lohelp.py:size=tiny"
FSDP = (
    # one wide stage, so that there is something worth splitting
    *("--config.model.layout=T", "--config.model.depths=(1,)", "--config.model.strides=(1,)"),
    *("--config.model.widths=(64,)", "--config.parallel.strategy=fsdp"),
    '--config.parallel.mesh={"data": 2, "fsdp": 4}',
)
CUDA = any(map(compiler_process.version, compiler_process.CUDA_PLUGINS))
LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the module's compilations are kept."""
    return tmp_path_factory.mktemp("home")


def plan(home, *args, code=0, **environment):
    command = [sys.executable, "-m", "localglobal_jax", "plan", *args]
    env = {**os.environ, "HOME": str(home), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def planned(home, monkeypatch, capsys):
    """``(*args, code) -> (stdout, stderr)`` of the command in this process."""
    monkeypatch.setenv("HOME", str(home))

    def planned(*args, code=0):
        assert main(["plan", *args]) == code
        return capsys.readouterr()

    return planned


def test_a_plan_and_what_is_kept_of_it(home, planned):
    args = ("--config", DIGITS, "--topology", "cpu:8", "--json", *FSDP)
    out, err = plan(home, *args)
    first = json.loads(out)
    assert "compiled before" not in err
    assert (first["devices"], first["mesh"], first["fits"]) == (8, {"data": 2, "fsdp": 4}, None)
    split = first["memory"]["split"]
    # a good part is split four ways, and the optimizer's two moments go with their parameters
    assert 4 * first["parameters"] / 4 < split["parameters"] < 2 * first["parameters"]
    assert split["optimizer"] == pytest.approx(2 * split["parameters"], rel=0.01)
    # parameters are gathered from those that split them, gradients are summed over all
    assert {row["group"] for row in first["collectives"]} >= {4, 8}
    assert first["flops"] > 0 and first["bytes_accessed"] > first["memory"]["needed"] / 4
    assert any(x["name"] == "type of the gradient's sum" for x in first["lints"])
    assert 0.5 < first["parameters_split"] < 1
    fused = first["perfect_fusion"]
    assert fused["flops"] <= first["flops"] and fused["bytes"] < first["bytes_accessed"]

    again, err = planned(*args)
    assert "compiled before" in err and json.loads(again) == first


def test_the_optimizer_gathers_no_moments(tmp_path):
    """Under "model", whole parameters get whole gradients: one gather, not one for each moment.

    These gradients (of norms, tables, biases) have 3.6 kB: gathering parameters, both moments and
    the average as well would be more than 14 kB. Compiled here, for the two devices of the tests.
    """
    tensor = {"parallel.strategy": "tensor", "parallel.mesh": '{"data": 1, "model": 2}'}
    given = {"model.widths": "(16, 128)", "model.depths": "(1, 1)", **tensor}
    run = validation.check(loading.load(DIGITS, given))
    facts = compile.compile_step(run, topologies.parse("cpu:2"), "train", tmp_path)
    with gzip.open(tmp_path / "program.txt.gz", "rt") as file:
        sent = collectives.collectives(hlo.Program(file.read()))
    gathered = sum(
        row["payload"]
        for row in roofline.grouped(sent, facts["parts"])
        if row["op"] == "all-gather" and row["layer"] == "(outside the model)"
    )
    assert 0 < gathered < 6000


@pytest.mark.slow  # in the suite: the table (roofline_test.py), --compare (bench_test.py)
def test_two_configs_side_by_side(planned):
    args = ("--config", DIGITS, "--compare", MUSE, "--topology", "cpu:2", "--step", "eval")
    out, _ = planned(*args)
    (parameters,) = [line.split() for line in out.splitlines() if line.startswith("parameters  ")][
        :1
    ]
    assert len(parameters) == 3 and parameters[1] != parameters[2]
    assert "not validated on hardware" in out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--topology", "cpu:7"], 2, "7 devices"),
        (["--topology", "cpu:6", '--config.parallel.mesh={"data": -1, "fsdp": 4}'], 2, "6 device"),
        (["--topology", "v5e:64x64"], 2, "16x16"),
        (["--topology", "h10-8"], 2, '"h100"'),
        (["--topology", "h100:2x9"], 2, "h100:HOSTSxGPUS"),
        (["--topology", "cpu:2", "--batch_search"], 2, "--batch_search"),
        (["--topology", "cpu:2", "--step", "decode"], 2, "--step decode"),
        (["--topology", "cpu:2", "--timeout", "0.2"], 1, "--timeout"),
        (["--topology", "cpu:2", "--config.parallel.compile=pmap"], 2, "compile=jit"),
        pytest.param(
            ["--topology", "h100-8"], 2, "[cuda]", marks=pytest.mark.skipif(CUDA, reason="has it")
        ),
    ],
)
def test_errors_say_what_to_do(home, planned, args, code, said):
    out, err = planned("--config", DIGITS, *args, code=code)
    assert said in err and not out
    one_line(err)
    cache = home / ".cache/localglobal/plan"
    assert not list(cache.glob("new-*"))  # nothing half cached


def one_line(err):
    """Asserts that an error has one line, apart from lines of progress."""
    lines = [line for line in err.splitlines() if not line.startswith("compiling ")]
    assert len(lines) == 1, err


def test_a_plugin_of_another_jax(home, tmp_path):
    """The real search of installed packages, which finds a plugin of version 0.5.0 first."""
    folder = tmp_path / "jax_cuda12_plugin-0.5.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: jax-cuda12-plugin\nVersion: 0.5.0\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    args = ("--config", DIGITS, "--topology", "h100-8")
    _, err = plan(home, *args, code=2, PYTHONPATH=path)
    assert "0.5.0" in err and compiler_process.version("jaxlib") in err
    one_line(err)


def test_a_compiler_without_memory(home):
    """The real compiler in 2.1 GiB of address space; the same command with more goes on."""
    args = ("plan", "--config", DIGITS, "--topology", "cpu:3", "--config.batch_size=33")
    command = shlex.join([sys.executable, "-m", "localglobal_jax", *args])
    env = {**os.environ, "HOME": str(home)}
    env.pop("GLIBC_TUNABLES", None)  # one arena needs less address space
    limited = ["bash", "-c", f"ulimit -v 2200000; exec {command}"]
    done = subprocess.run(limited, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert "ulimit -v: 2.10 GiB" in done.stderr and compiler_process.FAILED in done.stderr
    one_line(done.stderr)
    cache = home / ".cache/localglobal/plan"
    assert (cache / compiler_process.FAILED).is_file() and not list(cache.glob("new-*"))
    for facts in cache.glob("*/facts.json"):
        assert "out_of_memory" not in facts.read_text()  # not a verdict on the device


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [
        (-9, "", ["SIGKILL", "It used 2.00 GiB"]),
        (-6, "x\nterminate called\n  what():  std::bad_alloc\n", ["SIGABRT: what():", "2.00 GiB"]),
        (-6, "F0 x.cc:1] Check failed: chip_bounds().x <= 16\n*** stack\n", ["chip_bounds"]),
        (1, "Traceback\n  File\nValueError: wrong\n----\nFor simplicity, JAX has removed\n",
         ["exit code 1: ValueError: wrong"]),
        (-11, "", ["SIGSEGV"]),
        (127, "cannot allocate memory for thread-local data: ABORT\n", ["code 127", "2.00 GiB"]),
    ],
)  # fmt: skip
def test_reasons_are_one_line(code, said, found):
    reason = compiler_process.reason(code, said, 2**31, -1)
    assert all(text in reason for text in found) and "\n" not in reason
    assert ("2.00 GiB" in reason) == ("2.00 GiB" in " ".join(found))


def test_ended_from_outside_it_leaves_no_compiler_behind(tmp_path):
    command = [sys.executable, "-m", "localglobal_jax", "plan", "--config", DIGITS]
    env = {**os.environ, "HOME": str(tmp_path)}
    cache = tmp_path / ".cache/localglobal/plan"
    with subprocess.Popen([*command, "--topology", "cpu:2"], env=env) as asked:
        while asked.poll() is None and not list(cache.glob("new-*/log")):
            time.sleep(0.05)
        threads = pathlib.Path(f"/proc/{asked.pid}/task")
        while not (
            compiler := [c for f in threads.glob("*/children") for c in f.read_text().split()]
        ):
            assert asked.poll() is None
            time.sleep(0.05)
        asked.terminate()
        assert asked.wait() == 143
    assert not pathlib.Path(f"/proc/{compiler[0]}").exists()
    assert not list(cache.iterdir())


def test_ended_while_it_starts_the_compiler_it_leaves_none_behind(monkeypatch, tmp_path):
    """The signal came before its handler was installed: 143 was -15, and the compiler ran on."""
    start, started = subprocess.Popen, []

    def popen(command, **options):
        started.append(start(["sleep", "6000"]))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(compiler_process, "CACHE", tmp_path)
    run = validation.check(loading.load(DIGITS))
    with pytest.raises(SystemExit) as ended:
        compiler_process.measure(run, topologies.parse("cpu:2"), "train", timeout=600)
    assert ended.value.code == 143 and started[0].poll() is not None
    assert not list(tmp_path.glob("new-*"))


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"localglobal_jax\[tpu\].*cpu:8"):
        compiler_process.measure(None, topologies.parse("v5e-4"), "train", timeout=1)


@pytest.mark.parametrize(
    ("installed", "named"),
    [({}, r"\[cuda\]"), ({"jax-cuda12-plugin": "0.5.0", "jaxlib": "0.10.2"}, "0.5.0.*0.10.2")],
)
def test_without_a_cuda_plugin_that_fits(monkeypatch, installed, named):
    monkeypatch.setattr(compiler_process, "version", installed.get)
    with pytest.raises(ValueError, match=named):
        compiler_process.measure(None, topologies.parse("h100-8"), "train", timeout=1)


def test_a_compiler_that_aborts(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Check failed: chip_bounds().x <= 16'\nkill -ABRT $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(compiler_process, "CACHE", tmp_path)
    run = validation.check(loading.load(DIGITS))
    with pytest.raises(compiler_process.CompilerFailed, match=r"SIGABRT.*chip_bounds"):
        compiler_process.measure(run, topologies.parse("cpu:2"), "train", timeout=600)
    assert not list(tmp_path.glob("*-*"))  # nothing is kept but its output
    assert "chip_bounds" in (tmp_path / compiler_process.FAILED).read_text()


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs the extra [tpu]")
@pytest.mark.parametrize("step", ["train", "eval", "decode"])
def test_the_real_compiler(home, step):
    config = MUSE if step == "decode" else DIGITS
    out, _ = plan(home, "--config", config, "--topology", "v5e-4", "--step", step, "--json")
    found = json.loads(out)
    assert found["fits"] and found["estimated_cycles"] > 0
    assert 0 < found["step_ms"]["low"] <= found["step_ms"]["high"]
    assert found["memory"]["code"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda]")
@pytest.mark.parametrize("topology", ["h100-8", "h100:2x4", "a100-1", "h200-8", "b200-8"])
@pytest.mark.parametrize("step", ["train", "eval", "decode"])
def test_the_real_compiler_of_gpus(home, topology, step):
    config = MUSE if step == "decode" else DIGITS
    out, _ = plan(home, "--config", config, "--topology", topology, "--step", step, "--json")
    found = json.loads(out)
    assert found["fits"] and found["memory"]["temporary"] > 0
    assert 0 < found["step_ms"]["low"] <= found["step_ms"]["high"]
    assert {"fusion", "product"} <= {row["kind"] for row in found["kernels"]}
    between_hosts = found["network_bytes"] > 0
    assert between_hosts == (topology == "h100:2x4" and step != "decode") or step == "decode"


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda]")
@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
def test_attention_of_cudnn_with_split_parameters(home, strategy):
    args = ["--config", "configs/focal_imagenet.py:variant=tiny,data=mock", "--topology", "h100-8"]
    args += [f"--config.parallel.strategy={strategy}", "--config.batch_size=16"]
    args += ["--config.model.depths=(1,1,1,1)"]
    mesh = {"data": 1, "fsdp": 8} if strategy == "fsdp" else {"data": 8, "model": 1}
    out, _ = plan(home, *args, f"--config.parallel.mesh={mesh}", "--json")
    calls = {row["kind"]: row["count"] for row in json.loads(out)["kernels"]}
    assert calls["attention"] == 8  # one block a stage, forward and backward


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda]")
def test_a_batch_that_no_gpu_has_memory_for(home):
    args = ("--config", DIGITS, "--topology", "h100-1", "--config.batch_size=8000000")
    out, _ = plan(home, *args)
    assert "DOES NOT FIT: needs" in out and "of 59.33 GiB" in out


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda]")
def test_three_gpus_a_host(home):
    args = ("--config", DIGITS, "--topology", "h100:2x3", "--config.batch_size=36")
    out, _ = plan(home, *args, "--json")
    found = json.loads(out)
    assert found["devices"] == 6 and found["network_bytes"] > 0
    mesh = '--config.parallel.mesh={"data": -1, "model": 4}'
    _, err = plan(home, *args, mesh, "--config.parallel.strategy=tensor", code=2)
    assert "parallel.mesh" in err
    one_line(err)


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda]")
def test_two_configs_and_the_largest_batch_on_gpus(home):
    args = ("--config", DIGITS, "--topology", "h100-1")
    out, _ = plan(home, *args, "--compare.parallel.implementation=reference")
    bounds = [line.split() for line in out.splitlines() if line.startswith(("compute ", "nvlink "))]
    assert len(bounds) == 2 and all(row.count("ms") == 2 for row in bounds)
    assert "?" not in out
    out, _ = plan(home, *args, "--batch_search", "--config.batch_size=2000000", "--json")
    found = json.loads(out)
    assert found["fits"] and found["batch_size"] > 1000
    assert {trial["fits"] for trial in found["trials"]} == {True, False}
    too_large = min(trial["batch_size"] for trial in found["trials"] if not trial["fits"])
    assert found["batch_size"] < too_large <= found["batch_size"] * 17 / 16 + 1


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs the extra [tpu]")
def test_what_does_not_fit(home):
    args = ("--config", DIGITS, "--topology", "v5e-1", "--config.batch_size=2000000")
    out, _ = plan(home, *args)
    assert "DOES NOT FIT: needs" in out and "of 15.75 GiB" in out
