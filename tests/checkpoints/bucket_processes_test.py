# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket, in real processes, killed, stopped, on two hosts: the bits of a run on disk."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from localglobal_jax.checkpoints import objects, reader, steps
from localglobal_jax.cli.main import main

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py"
LAST = 24


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Processes share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def arguments(directory, data_dir, *options):
    """The command line of a run with a checkpoint every four steps."""
    return [
        *("train", f"--workdir={directory}"),
        *(f"--config={CONFIG}:size=tiny", f"--config.data.dir={data_dir}"),
        *(f"--config.steps={LAST}", "--config.log.every=4", "--config.checkpoint.every=4"),
        *("--config.checkpoint.keep=2", "--config.eval.every=12"),
        # one block, since every process compiles
        *("--config.model.layout=C", "--config.model.depths=(1,)", "--config.model.widths=(8,)"),
        "--config.model.strides=(1,)",
        *options,
    ]


def started(directory, data_dir, *options, devices=2):
    """The process of a run; its fake devices."""
    command = [sys.executable, "-m", "localglobal_jax", *arguments(directory, data_dir, *options)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finished(process, code=0):
    """The messages of a process, once it has ended with `code`; never a traceback of a library."""
    try:
        _, err = process.communicate(timeout=2400)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err and "Unclosed" not in err and "WARNING" not in err, err
    assert "/localglobal-" not in err  # the mirror
    return err


def killed_during_a_save(directory, data_dir, faults, step):
    """Starts a run and kills it in the save of `step`: an array's second write gets no answer."""
    pattern = f"uploadType=media&name=.*checkpoints/{step}/"
    rule = faults.add("stall", pattern, method="POST", skip=1, seconds=6000.0)
    process = started(directory, data_dir)
    try:
        while not rule.hits:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    faults.clear()


def same(one, other, last=LAST):
    (step, state, _), (step_other, state_other, _) = map(reader.read, (one, other))
    assert step == step_other == last
    assert jax.tree.structure(state) == jax.tree.structure(state_other)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """The run, on disk, in this process."""
    directory = tmp_path_factory.mktemp("disk") / "run"
    assert main(arguments(directory, data_dir)) == 0
    return directory


# 4, the first save, without a step to go back to: with -m slow.
@pytest.mark.parametrize("kills", [(8,), (4, 8)], ids=str)
def test_kills_in_saves_and_a_stop_change_no_bit(undisturbed, bucket, data_dir, faults, kills):
    checkpoints = epath.Path(bucket) / "checkpoints"
    for step in kills:
        killed_during_a_save(bucket, data_dir, faults, step)
        assert steps.scan(checkpoints) == ({4: True} if step > 4 else {})
        assert steps.interrupted(checkpoints) == [step]

    process = started(bucket, data_dir)
    try:
        while max(steps.scan(checkpoints)) <= 4:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=2400)
    finally:
        process.kill()
    assert process.returncode in (42, 0), err
    assert "resumed at step 4" in err and "damaged" not in err
    err = finished(started(bucket, data_dir, "--config.log.profile=(22, 1)"))
    assert f"wrote {bucket}/model_card.md" in err

    same(undisturbed, bucket)
    assert sorted(steps.scan(checkpoints)) == [LAST - 4, LAST]  # checkpoint.keep=2
    assert steps.interrupted(checkpoints) == []
    names = objects.sizes(epath.Path(bucket))
    assert not any("damaged" in name for name in names)
    boards = [name for name in names if name.startswith("tensorboard/events")]
    assert len(boards) >= 2  # one of each start that saved
    assert bucket in (epath.Path(bucket) / "model_card.md").read_text()


@pytest.mark.slow  # in the suite two hosts save in a bucket without a run: manager_test.py
def test_two_hosts_write_one_bucket(tmp_path, bucket, data_dir):
    """Each writes its shards; the bits are those of two hosts on a disk."""
    with contextlib.ExitStack() as stack:
        runs = []
        for directory in (tmp_path / "run", bucket):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                where = f"--coordinator=localhost:{free.getsockname()[1]}"
            for host in range(2):
                options = (where, "--hosts=2", f"--host={host}", "--config.log.tensorboard=false")
                options += ("--config.parallel.strategy=fsdp",)
                options += ("--config.parallel.mesh={'data': 1, 'fsdp': 2}", "--config.steps=8")
                process = started(directory, data_dir, *options, devices=1)
                stack.callback(process.communicate)
                stack.callback(process.kill)
                runs.append(process)
        for process in runs:
            finished(process)
    same(tmp_path / "run", bucket, last=8)
    names = objects.sizes(epath.Path(bucket) / "checkpoints" / "8")
    assert {name.split("/")[1] for name in names if "ocdbt.process" in name} == {
        *("ocdbt.process_0", "ocdbt.process_1")
    }
