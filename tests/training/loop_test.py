# SPDX-License-Identifier: Apache-2.0
"""Whole runs, in real processes: asked to stop, resumed, finished (killed: faults_test.py)."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small

from localglobal_jax import load
from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import chips
from localglobal_jax.profiling import bench
from localglobal_jax.training import loop
from localglobal_jax.training.reporting.run import OF_THE_MACHINE

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py"
TIMES = {"images_per_second", "steps_per_second", *OF_THE_MACHINE}


@pytest.fixture(scope="module")
def start(tmp_path_factory, data_dir):
    """``(workdir, *overrides) -> process`` of a run; the runs share their compiled programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return functools.partial(started, data_dir, cache)


def arguments(workdir, data_dir, *overrides):
    """The command line of a run of 45 steps."""
    return [
        *("train", "--json"),
        *(f"--config={CONFIG}:size=tiny", f"--workdir={workdir}", f"--config.data.dir={data_dir}"),
        *("--config.steps=45", "--config.log.every=7", "--config.log.tensorboard=false"),
        *("--config.model.layout=C", "--config.model.depths=(1,)"),  # every process compiles
        *("--config.model.widths=(8,)", "--config.model.strides=(1,)"),
        *overrides,
    ]


def started(data_dir, cache, workdir, *overrides):
    command = [sys.executable, "-m", "localglobal_jax", *arguments(workdir, data_dir, *overrides)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, **cache, "XLA_FLAGS": flags}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def reached(workdir, step):
    """Has a line of this step or a later one been written?"""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, start):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("reference")
    finish(start(workdir))
    return workdir


def test_a_run_leaves_what_the_readme_says(reference):
    assert {p.name for p in reference.iterdir()} == {
        *("checkpoints", "config.json", "learning_curve.png", "metrics.jsonl", "model_card.md")
    }
    assert [line["step"] for line in metrics(reference) if line["split"] == "train"] == [
        *(7, 14, 21, 28, 35, 42, 45)
    ]
    steps = {int(path.name) for path in (reference / "checkpoints").iterdir()}
    assert {40, 45} <= steps <= {10, 20, 30, 40, 45}  # the two newest, and the best
    module, variables = load(reference)
    logits, _ = module.apply(variables, np.zeros((1, 8, 8, 1), np.float32), train=False)
    assert logits.shape == (1, 10)


def test_what_a_run_says_of_the_machine(reference, data_dir, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    first, *others = [line for line in lines if line["split"] == "train"]
    assert first["compile_seconds"] > 0 and not any("compile_seconds" in line for line in others)
    assert all("mfu" not in line for line in lines)  # the peak of this CPU is not known
    assert 2**20 < first["memory_bytes"] <= others[-1]["memory_bytes"]
    images_a_step = first["images_per_second"] / first["steps_per_second"]
    assert images_a_step == pytest.approx(loading.load(f"{CONFIG}:size=tiny").batch_size)

    monkeypatch.setitem(chips.KINDS, jax.devices()[0].device_kind, "v5e")
    overrides = {"data.dir": data_dir, "steps": "4", "log.every": "2"}
    overrides |= {"optim.warmup_steps": "0", "log.tensorboard": "false", **small.IMAGES}
    run = validation.check(loading.load(f"{CONFIG}:size=tiny", overrides))
    loop.train(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    work = [x["mfu"] / x["steps_per_second"] for x in lines if x["split"] == "train"]
    subject = bench.BenchmarkedStep(run)
    counted = 2 * subject.multiply_adds(next(subject.batches()))
    assert work == pytest.approx([counted / 197e12 / jax.device_count()] * 2)


def test_asked_to_stop_it_saves_and_exits_with_42(reference, start, tmp_path):
    """By Ctrl-C while the profiler traces, then by SIGTERM; the third process ends the run."""
    profile = "--config.log.profile=(8, 30)"
    wanted, stopped = 7, []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(tmp_path, profile)
        try:
            wait_for(process, lambda step=wanted: reached(tmp_path, step))
            process.send_signal(number)
            _, err = process.communicate()
        finally:
            process.kill()
        assert process.returncode == 42, err
        assert "the state is saved" in err
        stopped.append(max(reader.inspect(tmp_path)["steps"], key=lambda s: s["step"])["step"])
        assert wanted <= stopped[-1] < 45
        wanted = stopped[-1] + 1
    check_trace(tmp_path)
    result = finish(start(tmp_path, profile, "--config.checkpoint.keep=2"))
    assert result["test"]["count"] == 360
    assert metrics(reference) == metrics(tmp_path)


def check_trace(workdir):
    """Asserts that every trace names programs and no calls of Python, see `Trace.OPTIONS`."""
    traces = list((workdir / "profile").rglob("*.xplane.pb"))
    assert traces
    for trace in traces:
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        names = [event.name for plane in planes for line in plane.lines for event in line.events]
        assert any("Execute" in name for name in names)
        assert not any(name.startswith("$") for name in names)


def test_finished_it_only_says_so_again(reference, data_dir, capsys):
    before = (reference / "metrics.jsonl").read_text()
    assert main(arguments(reference, data_dir)) == 0
    assert json.loads(capsys.readouterr().out)["test"]["step"] == 45
    assert (reference / "metrics.jsonl").read_text() == before


def test_divergence_is_exit_code_3_and_never_becomes_a_checkpoint(data_dir, tmp_path, capsys):
    command = arguments(
        tmp_path,
        data_dir,
        *("--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0"),
        *("--config.optim.warmup_steps=12", "--config.optim.name=sgd"),
        *("--config.checkpoint.every=1", "--config.eval.every=0", "--config.log.every=40"),
    )
    assert main(command) == 3
    err = capsys.readouterr().err
    step, state, _ = reader.read(tmp_path)
    assert f"the checkpoint of step {step} is kept" in err and "--replay" in err
    found = json.loads((tmp_path / "diverged.json").read_text())
    assert found["last_checkpoint"] == found["step"] == step >= 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state["variables"]))


def test_an_evaluation_of_the_training_set_has_a_name_of_its_own(tmp_path):
    """ "train" is the name of the lines of training."""
    overrides = {"steps": "2", "data.eval_splits": "('train', 'test')", "eval.every": "2"}
    overrides |= {"log.every": "2", "checkpoint.best": "train_eval/accuracy", **small.IMAGES}
    overrides |= {"optim.warmup_steps": "0", "log.tensorboard": "false"}
    run = validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", overrides))
    found = loop.train(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train", "train_eval", "test"]
    assert "count" not in found["train"] and found["train_eval"]["count"] == 256
    assert "train_eval" in (tmp_path / "model_card.md").read_text()


def test_a_finished_run_that_is_started_again_keeps_its_card_and_needs_no_metrics(tmp_path):
    texts = {"steps": "2", "optim.warmup_steps": "0", "log.tensorboard": "false"}
    run = validation.check(loading.load(f"{CONFIG}:size=tiny,data=mock", small.IMAGES | texts))
    loop.train(run, tmp_path, source="configs/coatnet_digits.py")
    card = (tmp_path / "model_card.md").read_text()
    loop.train(run, tmp_path, source="elsewhere.py")
    assert (tmp_path / "model_card.md").read_text() == card
    for name in ("metrics.jsonl", "model_card.md"):
        (tmp_path / name).unlink()
    assert loop.train(run, tmp_path) == {}
    assert "learning curve" not in (tmp_path / "model_card.md").read_text()
