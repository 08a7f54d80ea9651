# SPDX-License-Identifier: Apache-2.0
import importlib.util
import math
import os
import subprocess
import sys

import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.profiling import compiler_process, topologies


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v5p:4x4x12", "v5p:4x4x12", 192),
        ("v4-8", "v4:2x2x1", 4),
        ("v3-32", "v3:4x4", 32),
        ("v6e-1", "v6e:1x1", 1),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("cpu:8", "cpu:8", 8),
        ("h100-8", "h100:1x8", 8),
        ("h100-64", "h100:8x8", 64),
        ("a100:2x4", "a100:2x4", 8),
        ("h200-3", "h200:1x3", 3),
        ("h100:1x8", "h100:1x8", 8),
    ],
)
def test_cloud_names_and_shapes(text, name, devices):
    found = topologies.parse(text)
    assert (found.name, found.devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("v5e:32x32", ["2x2", "16x16"]),  # libtpu describes it, then aborts the process
        ("v5e:3x4", ["2x2", "16x16"]),
        ("v5e:4x4x4", ["2x2", "16x16"]),
        ("v5p:8x8", ["2x2x1", "16x20x28"]),
        ("v5p:16x20x32", ["2x2x1", "16x20x28"]),
        ("v5e-300", ["1, 4, 8, 16", "v5e:4x4"]),
        ("v5p-7", ["8, 16, 32", "v5p:4x4x4"]),
        ("v5pp:4x4x4", ['"v5p"']),
        ("v5litepo-16", ['"v5litepod"']),
        ("h10-8", ['"h100"']),
        ("h10:2x8", ['"h100"']),
        ("H100-8", ['"h100"']),
        ("rtx4090-1", ["a100", "h100"]),
        ("cpu-8", ["v5e:16x16", "h100-8", "cpu:8"]),
        ("v5e", ["v5e:16x16", "h100-8", "cpu:8"]),
        ("h100", ["h100-N", "h100:HOSTSxGPUS"]),
        ("h100:8", ["h100-N", "h100:HOSTSxGPUS"]),
        ("h100-12", ["h100-N", "8"]),
        ("h100:0x8", ["h100-N", "1024"]),
        ("h100:2000x8", ["h100-N", "1024"]),
        ("h100:2x4x4", ["h100-N", "h100:HOSTSxGPUS"]),
        ("a100:2x9", ["a100:HOSTSxGPUS", "8"]),
        ("h200-0", ["h200-N"]),
        ("cpu:0", ["1", "1024"]),
    ],
)
def test_slices_that_do_not_exist(text, values):
    with pytest.raises(ValueError, match="topology") as error:
        topologies.parse(text)
    assert all(value in str(error.value) for value in values), error.value


def test_every_cloud_size_is_a_slice():
    for kind, chip in topologies.CHIPS.items():
        for chips, shape in topologies.cloud_sizes(chip).items():
            assert chips == math.prod(shape)
            scale = 2 if chip.counts_cores else 1
            found = topologies.parse(f"{chip.cloud[0]}-{scale * chips}")
            assert found == topologies.parse(f"{kind}:{'x'.join(map(str, shape))}")


def test_peaks_are_of_a_device():
    assert topologies.parse("v5e-4").peak("flops") == 197e12
    assert topologies.parse("v3-8").peak("flops") == 123e12 / 2
    assert topologies.parse("cpu:4").peak("flops") is None


SLICES = "v2:4x4 v3:32x32 v4:2x2x4 v5e:1x1 v5e:1x2 v5e:16x16 v5p:16x20x28 v6e:1x1 tpu7x:4x4x4"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]")
def test_libtpu_knows_the_slices():
    """In one process of its own: libtpu reads its environment when it is first used."""
    code = (
        "import sys; from localglobal_jax.profiling import compile, topologies\n"
        "for t in map(topologies.parse, sys.argv[1:]):\n"
        "    assert len(compile.devices_of(t)) == t.devices, t\n"
    )
    env = compiler_process.environment(topologies.parse("v5e-4"), os.environ)
    subprocess.run([sys.executable, "-c", code, *SLICES.split()], env=env, check=True)


def test_a_compilation_is_another_one_under_other_settings_of_jax(tmp_path, monkeypatch):
    run = validation.check(loading.load("configs/coatnet_digits.py:size=tiny,data=mock"))
    topology = topologies.parse("cpu:2")
    found = [compiler_process.key(run, topology, "train")]
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    found.append(compiler_process.key(run, topology, "train"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # changes no program
    assert compiler_process.key(run, topology, "train") == found[1] != found[0]


def test_a_compilation_is_another_one_for_more_classes(tmp_path):
    given = {"data.name": "folder", "data.dir": str(tmp_path)}
    run = validation.check(loading.load("configs/coatnet_digits.py:size=tiny", given))
    found = set()
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"1")
        if name != "cat":
            found.add(compiler_process.key(run, topologies.parse("cpu:2"), "train"))
    assert len(found) == 2
