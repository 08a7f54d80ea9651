# SPDX-License-Identifier: Apache-2.0
"""Every strategy computes the same, on eight fake devices in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STRATEGIES = {
    "one device": (1, {}),
    "replicate": (8, {}),
    "pmap": (8, {"parallel.compile": "pmap"}),
    "fsdp": (8, {"parallel.strategy": "fsdp", "parallel.mesh": "{'data': 2, 'fsdp': 4}"}),
    "tensor": (8, {"parallel.strategy": "tensor", "parallel.mesh": "{'data': 4, 'model': 2}"}),
    "fsdp+tensor": (
        8,
        {
            "parallel.strategy": "fsdp+tensor",
            "parallel.mesh": "{'data': 2, 'fsdp': 2, 'model': 2}",
        },
    ),
}
RUNS = {
    "coatnet": ("coatnet_digits", {"model.drop_path": "0.0", "data.mock": "true"}),
    "muse": (
        "muse_lohelp",
        {
            "model.dropout": "0.0",
            "model.widths": "(64, 64)",
            "model.hidden": "(128, 128)",
            "model.heads": "(4, 4)",
            "task.beam": "0",
            "checkpoint.best": "-validation/loss",
            "data.mock": "true",
        },
    ),
}


def run(model, strategy, workdir):
    """The lines of metrics of a few steps."""
    config, overrides = RUNS[model]
    devices, options = STRATEGIES[strategy]
    common = {"steps": "6", "log.every": "1", "log.tensorboard": "false", "eval.every": "3"}
    command = [
        *(sys.executable, "-m", "localglobal_jax", "train"),
        *(f"--config={CONFIGS / config}.py:size=tiny", f"--workdir={workdir}"),
        *(f"--config.{k}={v}" for k, v in {**overrides, **common, **options}.items()),
    ]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    done = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=RUNS)
def reference(request, tmp_path_factory):
    return request.param, run(request.param, "one device", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("strategy", list(STRATEGIES)[1:])
def test_the_same_losses(strategy, reference, tmp_path):
    model, wanted = reference
    found = run(model, strategy, tmp_path)
    for line, other in zip(found, wanted, strict=True):
        assert line["split"] == other["split"]
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=2e-4)
