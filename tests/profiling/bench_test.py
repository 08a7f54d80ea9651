# SPDX-License-Identifier: Apache-2.0
"""`localglobal bench`: what it reports, of one config and of two. Nothing here depends on time."""

import json

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.parallel import chips

DIGITS = ("--config", "configs/coatnet_digits.py:size=tiny")
MUSE = ("--config", "configs/muse_lohelp.py:size=tiny,data=mock")


def bench(capsys, *args):
    assert main(["bench", "--json", "--steps", "3", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_training_step(capsys):
    found = bench(capsys, *DIGITS)
    step, there = found["step_ms"], found["with_input"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert found["items"] == "images"
    assert found["items_per_second"] == pytest.approx(1e3 * found["batch"] / step["median"])
    assert 0 <= there["input_wait"] <= 1
    assert there["items_per_second"] > 0
    assert found["compile_seconds"] > 0
    assert found["flops_per_device"] > 0
    assert found["mfu"] is None  # of a CPU nobody knows the peak
    assert "times_as_fast_as_first" not in found


def test_two_configs_in_turns(capsys):
    first, second = bench(capsys, *DIGITS, "--compare.optim.accumulate=2", "--step", "train")
    assert first["config"] == DIGITS[1]
    assert second["config"] == f"{DIGITS[1]} optim.accumulate=2"
    ratio = second["times_as_fast_as_first"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("step", ["eval", "decode"])
def test_text_and_the_other_steps(step, capsys):
    found = bench(capsys, *MUSE, "--step", step)
    assert found["step"] == step
    assert found["items"] == "tokens"
    assert (found["flops_per_device"] is None) == (step == "decode")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "1"], "at least 2"),
        (["--steps", "20"], "Ask for fewer"),
        (["--config.parallel.compile=pmap"], "jit"),
        (["--step", "decode"], "predicts nothing"),
        (["--compare.optim.learning_rat=1"], "--compare, configs/coatnet_digits.py"),
        (["--compare.optim.learning_rat=1"], 'did you mean "learning_rate"'),
    ],
)
def test_refusals(args, message, capsys):
    assert main(["bench", *DIGITS, "--steps", "3", *args]) == 2
    assert message in capsys.readouterr().err


def test_overrides_of_a_second_config_belong_to_two_commands(capsys):
    assert main(["models", "--compare.dtype=bfloat16"]) == 2
    assert "takes no --compare.dtype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v3", 61.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert chips.peak_flops(kind) == peak
