# SPDX-License-Identifier: Apache-2.0
"""``machine.py --gpu`` on a CPU: our side is real, PyTorch's is a program that speaks its part.

Also the formulations that ``tpu_forms.py`` compiles: they compute what the block computes.
"""

import csv
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import make
from localglobal_jax.blocks.convolution import MBConvBlock
from localglobal_jax.parallel import context

MACHINE = pathlib.Path(__file__).parent.parent / "experiments/benchmarks/machine.py"
# Stands for an interpreter with torch: `theirs.py infer ...` runs out of memory, the rest works.
THEIRS = """#!/bin/sh
case "$*" in
    *volo_d1_224*)
        echo "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" >&2
        echo "a last line that says nothing" >&2
        exit 1;;
esac
echo "some library's banner"
echo "ready torch 9.9, a stand-in"
while read line; do echo "seconds 0.5"; done
"""


@pytest.fixture
def theirs(tmp_path):
    file = tmp_path / "python"
    file.write_text(THEIRS)
    file.chmod(0o755)
    return file


def machine(*args, code=0, **environment):
    env = {**os.environ, "PYTHONPATH": str(MACHINE.parent.parent.parent), **environment}
    command = [sys.executable, str(MACHINE), "--gpu", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def rows(file):
    with file.open(newline="") as opened:
        return {row["name"]: row for row in csv.DictReader(opened)}


def test_a_row_without_memory_says_so_and_the_rest_go_on(theirs, tmp_path, monkeypatch):
    table = tmp_path / "gpu.csv"
    names = ("volo_d1", "coatnet_0 inference")
    args = ("--theirs", theirs, "--check", table, *names)
    said = machine(*args, code=1, PATH="")  # without nvidia-smi
    assert len(said) == 2
    found = rows(table)
    failed, done = (next(v for k, v in found.items() if k.startswith(name)) for name in names)
    assert "theirs.py" in failed["failed"] and "CUDA out of memory" in failed["failed"]
    assert "a last line" not in failed["failed"]
    assert not done["failed"] and float(done["their_seconds"]) == 0.5
    ours = float(done["our_seconds"])  # written with four decimals, and there are but a few
    assert 0.5 / (ours + 1e-4) < float(done["ratio_median"]) < 0.5 / (ours - 1e-4)
    assert done["gpu"] == "" and done["theirs"] == "torch 9.9, a stand-in"

    (again,) = machine(*args[:-2], "coatnet_0 inference", PATH="")
    assert "--again" in again and rows(table) == found  # it goes on where it was

    monkeypatch.setattr(make, "HERE", tmp_path)
    text = "\n".join(make.gpu())
    assert "CUDA out of memory" in text and "500 ms" in text


def test_the_first_of_several_gpus_is_named(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA H100 $4, 570.1"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.syspath_prepend(MACHINE.parent)
    pairs = importlib.import_module("pairs")
    assert pairs.gpu() == "NVIDIA H100 3, 570.1"
    smi.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert pairs.gpu() == ""


@pytest.mark.slow
def test_every_row(theirs, tmp_path):
    table = tmp_path / "check.csv"
    machine("--theirs", theirs, "--check", table, code=1)
    failed = {name for name, row in rows(table).items() if row["failed"]}
    assert len(rows(table)) == 5 and failed == {"volo_d1 inference / timm compiled"}


def test_formulations_for_tpu_compute_the_block(monkeypatch):
    """Outputs, gradients and new statistics; two tiles of examples and two of channels."""
    monkeypatch.syspath_prepend(MACHINE.parent)
    forms = importlib.import_module("tpu_forms_mbconv")
    block = MBConvBlock(features=16, stride=2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1, 1, (4, 6, 6, 16)), jnp.float32)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x), x)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes
    )
    others = {k: v for k, v in variables.items() if k != "params"}

    def found(module):
        def loss(params, x):
            y, new = module.apply({"params": params, **others}, x, train=True, mutable=[*others])
            return (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).sum() / y.size, (y, new)

        with context.implementation("fused"):
            return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    expected = found(block)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1][0]))
    branches = [forms.Tiles(2, 32, second=True), forms.Rows(1, 32), forms.keeping("z", "y")]
    for branch in branches:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest),
            found(forms.Form(block, branch)),
            expected,
        )
