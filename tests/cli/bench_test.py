# SPDX-License-Identifier: Apache-2.0
"""`localglobal bench`: reports of one config and of two; no assertion depends on the speed."""

import json

import pytest
import small

from localglobal_jax.cli.main import main
from localglobal_jax.profiling import bench_input

DIGITS = ("--config", "configs/coatnet_digits.py:size=tiny")
MUSE = ("--config", "configs/muse_lohelp.py:size=tiny,data=mock")
SMALL_DIGITS = (*DIGITS, *(f"--config.{k}={v}" for k, v in small.IMAGES.items()))
SMALL_MUSE = (*MUSE, *(f"--config.{k}={v}" for k, v in small.TEXT.items()))


def bench(capsys, *args):
    assert main(["bench", "--json", "--steps", "3", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_training_step(capsys):
    found = bench(capsys, *SMALL_DIGITS)
    step, there = found["step_ms"], found["with_input"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert found["items"] == "images"
    assert found["items_per_second"] == pytest.approx(1e3 * found["batch"] / step["median"])
    assert 0 <= there["input_wait"] <= 1
    assert there["items_per_second"] > 0
    assert found["compile_seconds"] > 0
    assert found["flops_per_device"] > 0
    assert found["mfu"] is None  # the peak of a CPU is unknown
    assert "times_as_fast_as_first" not in found


def test_two_configs_in_turns(capsys):
    first, second = bench(capsys, *SMALL_DIGITS, "--compare.optim.accumulate=2", "--step", "train")
    assert first["config"] == DIGITS[1]
    assert second["config"] == f"{DIGITS[1]} optim.accumulate=2"
    ratio = second["times_as_fast_as_first"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("step", ["eval", "decode"])
def test_text_and_the_other_steps(step, capsys):
    found = bench(capsys, *SMALL_MUSE, "--step", step)
    assert found["step"] == step
    assert found["items"] == "tokens"
    assert (found["flops_per_device"] is None) == (step == "decode")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "1"], "--steps 1:"),
        (["--steps", "20"], "--steps 20:"),
        (["--config.parallel.compile=pmap"], "parallel.compile=jit"),
        (["--step", "decode"], "--step decode"),
        (["--compare.optim.learning_rat=1"], "--compare, configs/coatnet_digits.py"),
        (["--compare.optim.learning_rat=1"], '"learning_rate"'),
    ],
)
def test_refusals(args, message, capsys):
    assert main(["bench", *DIGITS, "--steps", "3", *args]) == 2
    assert message in capsys.readouterr().err


def test_overrides_of_a_second_config_belong_to_two_commands(capsys):
    assert main(["models", "--compare.dtype=bfloat16"]) == 2
    assert "--compare.dtype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ((*DIGITS, "--config.data.in_memory=False"), {"reading", "decoding", "augmentation"}),
        (DIGITS, {"augmentation"}),
        (MUSE, {"padding"}),
    ],
    ids=["decoded", "in memory", "text"],
)
def test_the_input_alone(capsys, config, stages):
    threads, workers = bench(capsys, "--input", *config, "--compare.data.workers=1")
    assert (threads["workers"], workers["workers"]) == (0, 1)
    for found in (threads, workers):
        assert {*found["us_per_item"]} == stages
        assert min(found["us_per_item"].values()) >= 0
        assert found["items_per_second"] > 0 and found["mb_per_second"] > 0
        assert (found["read_mb_per_second"] > 0) == ("reading" in stages)
        assert found["bottleneck"] in {*stages, bench_input.WAITING}
        assert found["in_memory"] == ("reading" not in stages)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_input_alone_as_text(capsys, in_memory):
    field = f"--config.data.in_memory={in_memory}"
    assert main(["bench", "--input", "--steps", "2", *DIGITS, field]) == 0
    said = capsys.readouterr().out
    assert "images/s" in said
    assert ("data.in_memory=false" in said) == in_memory


@pytest.mark.parametrize("how", [["--input"], []])
def test_measuring_writes_nothing_into_a_bucket(bucket, faults, capsys, how):
    command = ["bench", *how, "--steps", "2", *DIGITS, f"--config.data.dir={bucket}"]
    assert main(command) == 2
    assert f"localglobal prepare digits --dir {bucket}" in capsys.readouterr().err
    assert {method for method, _, _ in faults.requests} == {"GET"}
