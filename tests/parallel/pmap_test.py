# SPDX-License-Identifier: Apache-2.0
"""pmap on two hosts, two real processes of two devices: checkpoints, and the numbers of jit."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from localglobal_jax.config import loading, validation
from localglobal_jax.training import loop

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
COMMON = {
    "steps": "6", "optim.warmup_steps": "1", "eval.every": "0", "log.every": "1",
    "checkpoint.every": "2", "checkpoint.keep": "9", "checkpoint.best": "None",
    "log.tensorboard": "false", "data.eval_splits": "()",
}  # fmt: skip
RUNS = {
    "coatnet": (
        "coatnet_digits.py:size=tiny,data=mock",
        {
            **{"model.drop_path": "0.0", "model.layout": "C", "model.depths": "(1,)"},
            **{"model.widths": "(16,)", "model.strides": "(1,)"},
            "batch_size": "16",
        },
    ),
    "muse": (
        "muse_lohelp.py:size=tiny,data=mock",
        {
            **{"model.dropout": "0.0", "model.widths": "(32, 32)"},
            **{"model.hidden": "(64, 64)", "model.heads": "(2, 2)"},
        },
    ),
}
# Trains under pmap, from its third under jit, and from two thirds of that under pmap again; `ways`
# of these.
HOST = """
import json, pathlib, shutil, sys
from localglobal_jax.config import loading, validation
from localglobal_jax.parallel import multihost, rendezvous
from localglobal_jax.training import loop

address, host, config, overrides, root, ways = sys.argv[1:]
rendezvous.start(rendezvous.Cluster(address, 2, int(host)), 60)
for name, way, start, gone in (("pmap", "pmap", None, ()), ("on", "jit", "pmap", "46"),
                               ("back", "pmap", "on", "6"))[:int(ways)]:
    workdir = pathlib.Path(root, name)
    if start and multihost.rank() == 0:
        shutil.copytree(pathlib.Path(root, start), workdir)
        for step in gone:
            shutil.rmtree(workdir / "checkpoints" / step)
    multihost.barrier(name)
    way = {"parallel.compile": way}
    run = validation.check(loading.load(config, {**json.loads(overrides), **way}))
    loop.train(run, str(workdir))
    multihost.barrier(f"after {name}")
"""


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


@pytest.mark.parametrize("ways", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["coatnet", pytest.param("muse", marks=pytest.mark.slow)])
def test_two_hosts_save_under_pmap_and_go_on_under_jit_and_back(family, ways, tmp_path):
    config, overrides = RUNS[family]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [str(CONFIGS / config), json.dumps({**COMMON, **overrides}), str(tmp_path), str(ways)]
    env = {**os.environ, "LOCALGLOBAL_DEBUG": "1"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(host), *words], env=env,
            stderr=subprocess.PIPE, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    try:
        said = [host.communicate(timeout=2400)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert [host.returncode for host in hosts] == [0, 0], said
    steps = [*"123456", *"3456", *"56"][: {1: 6, 3: 12}[ways]]
    assert re.findall(r"^step (\d)/6", said[0], re.MULTILINE) == steps
    if ways == 1:  # goes on in this process, on its two devices
        shutil.copytree(tmp_path / "pmap", tmp_path / "on")
        for gone in "46":
            shutil.rmtree(tmp_path / "on" / "checkpoints" / gone)
        loop.train(validation.check(loading.load(words[0], COMMON | overrides)), tmp_path / "on")
    names = ("pmap", "on") if ways == 1 else ("pmap", "on", "back")
    found = {name: losses(tmp_path / name) for name in names}
    for name, by_step in found.items():
        assert sorted(by_step) == [1, 2, 3, 4, 5, 6]
        assert {p.name for p in (tmp_path / name / "checkpoints").iterdir()} >= {"2", "6"}
        values = ([x[step] for step in range(1, 7)] for x in (by_step, found["pmap"]))
        np.testing.assert_allclose(*values, rtol=2e-4, err_msg=name)
