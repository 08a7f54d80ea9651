# SPDX-License-Identifier: Apache-2.0
"""Real processes that train one run: the same losses, one fate, names of who is missing."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from localglobal_jax.checkpoints import workdir
from localglobal_jax.cli.main import main
from localglobal_jax.parallel import multihost, rendezvous

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_digits.py"
COMMAND = [
    *(sys.executable, "-m", "localglobal_jax", "train", f"--config={CONFIG}:size=tiny"),
    *("--config.data.mock=true", "--config.model.layout=C", "--config.model.depths=(1,)"),
    *("--config.model.widths=(16,)", "--config.model.strides=(1,)"),  # every process compiles
    *("--config.steps=5000", "--config.log.every=1", "--config.log.tensorboard=false"),
    *("--config.eval.every=0", "--config.checkpoint.every=0", "--config.checkpoint.best=None"),
]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def training(workdir, processes, devices, *options, of_host=((), ())):
    """The processes of one run, each with so many fake devices; none of them survives."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    coordinator = f"--coordinator=localhost:{free_port()}"
    started = []
    for host in range(processes):
        many = [coordinator, f"--hosts={processes}", f"--host={host}"] if processes > 1 else []
        log = workdir.with_name(f"{workdir.name}-{host}-of-{processes}.log")
        own = of_host[host] if processes > 1 else ()
        command = [*COMMAND, f"--workdir={workdir}", *many, *options, *own]
        with log.open("w") as stderr:
            environment = {**os.environ, "XLA_FLAGS": flags}
            with log.with_suffix(".out").open("w") as stdout:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
                )
        started[-1].log = log
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def lines(workdir):
    """The training lines so far: step -> loss."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in found if line["split"] == "train"}


def wait_for(workdir, step, processes):
    while max(lines(workdir), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.log.read_text()
        time.sleep(0.05)


def end(processes):
    return [process.wait(timeout=1800) for process in processes]


def stopped_after(workdir, step, processes):
    """SIGTERM to the last host once `step` is reported; the step at which all of them saved."""
    wait_for(workdir, step, processes)
    processes[-1].send_signal(signal.SIGTERM)
    assert end(processes) == [42] * len(processes), [p.log.read_text() for p in processes]
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def trained_here(workdir, step, monkeypatch):
    """Trains in this process, on its two devices, until a stop is asked for at `step`."""

    @contextlib.contextmanager
    def requests(seen):
        yield lambda reached: reached >= step

    monkeypatch.setattr(multihost, "stop_requests", requests)
    assert main([*COMMAND[3:], f"--workdir={workdir}"]) == 42


def test_two_hosts_train_as_one_stop_together_and_go_on_as_another_number(tmp_path, monkeypatch):
    """Parameters are split over two of four devices; then each of two devices has all of them."""
    split = ("--config.parallel.strategy=fsdp", "--config.parallel.mesh={'data': 2, 'fsdp': 2}")
    with training(tmp_path / "run", 2, 2, *split) as two:
        saved = stopped_after(tmp_path / "run", 3, two)
        for host, process in enumerate(two):
            text = process.log.read_text()
            assert f"stopped at step {saved} of 5000; the state is saved" in text
            assert f"{host} of 2: all are here" in text and "2 of 4 devices" in text
            assert process.log.with_suffix(".out").read_text() == ""  # of gloo
            assert "preemption sync point" not in text, text  # of orbax
    assert max(lines(tmp_path / "run")) == saved
    for name in ("run", "whole"):
        trained_here(tmp_path / name, saved + 3, monkeypatch)
    parts, whole = lines(tmp_path / "run"), lines(tmp_path / "whole")
    steps = range(1, saved + 4)
    np.testing.assert_allclose(
        [parts[i] for i in steps], [whole[i] for i in steps], rtol=2e-3, err_msg=f"saved {saved}"
    )


def test_an_evaluation_tolerates_a_bad_picture_that_one_host_reads(tmp_path):
    """The number of pictures that count is the same on all hosts."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 6)):
        for name in ("ant", "bee"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    damaged = folder / "0.png"  # of bee: host 1 reads it
    damaged.write_bytes(damaged.read_bytes()[:40])
    fields = ["data.mock=false", "data.name=folder", f"data.dir={tmp_path / 'pictures'}"]
    fields += ["data.in_memory=False", "data.max_bad_records=2", "data.eval_splits=('validation',)"]
    fields += ["steps=1", "optim.warmup_steps=0", "batch_size=4", "eval.batch_size=4"]
    options = [f"--config.{field}" for field in fields]
    with training(tmp_path / "run", 2, 1, *options) as two:
        assert end(two) == [0, 0], [p.log.read_text() for p in two]
        assert any("skipped (1 of at most 2)" in p.log.read_text() for p in two)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [line["count"] for line in found if line["split"] == "validation"] == [11]


@pytest.mark.slow  # with hosts that do not train: watch_test.py
@pytest.mark.parametrize("killed", [0, 1])
def test_a_host_that_is_killed_ends_the_others_with_its_name(killed, tmp_path):
    """Also host 0, whose loss makes jax abort the others at once."""
    with training(tmp_path / "run", 2, 1) as two:
        wait_for(tmp_path / "run", 2, two)
        two[killed].kill()
        left = two[1 - killed]
        code = left.wait(timeout=600)
        text = left.log.read_text()
    assert code == 42, text
    assert f"host {killed} ({socket.gethostname()}) is lost" in text


def test_what_is_wrong_ends_all_hosts_and_writes_nothing(tmp_path):
    with training(tmp_path / "run", 2, 1, "--config.batch_size=7") as two:
        assert end(two) == [2, 2]
        assert all("batch_size=7 is not divisible by the 2" in p.log.read_text() for p in two)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["cat", "zebra"])
def test_hosts_with_other_data_do_not_train_together(other, tmp_path):
    """Two pictures of dogs in place of one; or a class of another name."""
    for host in range(2):
        for name in ("dog", other if host else "cat"):
            folder = tmp_path / f"data{host}" / "train" / name
            folder.mkdir(parents=True)
            for i in range(2 + host * (other == "cat")):
                Image.new("L", (8, 8), 9 * i).save(folder / f"{i}.png")
    own = [[f"--config.data.dir={tmp_path}/data{host}"] for host in range(2)]
    given = ["--config.data.mock=false", "--config.data.name=folder", "--config.data.channels=1"]
    given += ["--config.data.eval_splits=()", "--config.batch_size=2"]
    with training(tmp_path / "run", 2, 1, *given, of_host=own) as two:
        assert end(two) == [2, 2]
        assert all("of the hosts differ" in p.log.read_text() for p in two)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("--config.data.dir=/data/heartbeat: no such data set"), False),
        (ValueError("gs://b/nccl belongs to a run with another config"), False),
        (OSError("gs://b/x: UNAVAILABLE: HTTP response code 503"), False),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("INTERNAL: NCCL operation ncclAllReduce failed"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout"), True),
    ],
    ids=str,
)
def test_only_errors_of_collectives_are_lost_hosts(error, lost, monkeypatch):
    monkeypatch.setattr(multihost, "count", lambda: 2)
    kind = multihost.HostLost if lost else type(error)
    with pytest.raises(kind), multihost.naming_the_lost():
        raise error


def test_what_only_the_first_host_can_see_ends_all_hosts(tmp_path):
    with workdir.Lock() as lock:
        lock.take(tmp_path / "run" / ".lock")
        with training(tmp_path / "run", 2, 1) as two:
            assert end(two) == [1, 1]
            assert all(f"locked by pid {os.getpid()}" in p.log.read_text() for p in two)


# ------------------------------------------------------------------------------------- roll call


def call(cluster, timeout, results):
    try:
        results[cluster.rank] = rendezvous.rendezvous(cluster, timeout)
    except multihost.HostLost as error:
        results[cluster.rank] = str(error)


def calls(size, present, timeout=2.0):
    results, address = {}, f"localhost:{free_port()}"
    threads = [
        threading.Thread(
            target=call, args=(rendezvous.Cluster(address, size, rank), timeout, results)
        )
        for rank in present
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_roll_call_gives_all_names():
    found = calls(3, (2, 1, 0), timeout=300)
    assert found == dict.fromkeys(range(3), [socket.gethostname()] * 3)


@pytest.mark.parametrize("length", [20, 253])
def test_roll_call_gives_all_names_of_a_whole_pod(length, monkeypatch):
    """64 hosts are a slice of v5e-256."""
    hosts = iter(f"{i:03}-".ljust(length, "x") for i in range(1000))
    named = threading.local()

    def hostname():
        if not hasattr(named, "host"):
            named.host = next(hosts)
        return named.host

    monkeypatch.setattr(socket, "gethostname", hostname)
    found = calls(64, range(64), timeout=60)
    (names,) = {tuple(each) for each in found.values()}
    assert len(found) == len(names) == len(set(names)) == 64
    assert {len(name) for name in names} == {length}


def test_strangers_do_not_disturb_the_roll_call():
    results, address = {}, f"localhost:{free_port()}"
    threads = [
        threading.Thread(target=call, args=(rendezvous.Cluster(address, 2, rank), 600, results))
        for rank in (0, 1)
    ]
    threads[0].start()
    place = ("localhost", int(address.rpartition(":")[2]))
    with _connected(place), _connected(place) as talking:  # one says nothing, one not our words
        talking.sendall(b"EHLO me\n")
        threads[1].start()
        for thread in threads:
            thread.join()
    assert results == dict.fromkeys(range(2), [socket.gethostname()] * 2)


def _connected(place):
    for _ in range(200):
        try:
            return socket.create_connection(place)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("host 0 does not listen")


def test_roll_call_names_who_is_missing_on_every_host():
    found = calls(4, (0, 2))
    assert found == dict.fromkeys(
        (0, 2), "host 1, 3 of 4 did not turn up; start the command on every host"
    )


def test_roll_call_without_its_first_host():
    assert "host 0 did not answer at localhost:" in calls(2, (1,))[1]


def test_two_hosts_with_one_number():
    results, address = {}, f"localhost:{free_port()}"
    zero = threading.Thread(target=call, args=(rendezvous.Cluster(address, 3, 0), 30, results))
    zero.start()
    for _ in range(2):
        threading.Thread(target=call, args=(rendezvous.Cluster(address, 3, 1), 30, {})).start()
    zero.join()
    assert "says that it is host 1, which is another one's number" in results[0]


@pytest.mark.parametrize(
    ("address", "rank"), [("nowhere", 0), ("localhost:1", 2), ("localhost:99999", 0)]
)
def test_a_cluster_that_cannot_be(address, rank):
    with pytest.raises(ValueError, match="HOST:PORT"):
        rendezvous.start(rendezvous.Cluster(address, 2, rank))


def test_a_port_in_use_is_not_a_wrong_config(tmp_path, capfd):
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        words = [f"--workdir={tmp_path / 'run'}", f"--coordinator={address}"]
        assert main([*COMMAND[3:], *words, "--hosts=2", "--host=0"]) == 1
    said = capfd.readouterr().err
    assert f"--coordinator {address}" in said and len(said.splitlines()) < 4
    assert not (tmp_path / "run").exists()


BARRIER = """
import sys, time
from localglobal_jax.parallel import multihost, rendezvous
rendezvous.start(rendezvous.Cluster(sys.argv[1], 2, int(sys.argv[2])), 30)
if multihost.rank() == 0:
    try:
        multihost.barrier("restored", 0.5)
    except multihost.HostLost as error:
        print(error)
multihost.barrier("end")
"""


def test_a_barrier_names_who_is_late():
    address = f"localhost:{free_port()}"
    two = [
        subprocess.Popen(
            [sys.executable, "-c", BARRIER, address, str(host)], stdout=subprocess.PIPE, text=True
        )
        for host in range(2)
    ]
    (text, _), _ = [process.communicate(timeout=600) for process in two]
    assert 'host 0 waited 0 s at "restored" for host 1: look at its log' in text
    assert end(two) == [0, 0]


@pytest.mark.slow
def test_two_hosts_stop_early_at_the_same_evaluation(tmp_path):
    """Nothing improves after the first one; started again, they do nothing."""
    still = ("--config.optim.learning_rate=1e-12", "--config.optim.ema=0")
    stop = ("--config.eval.every=2", "--config.eval.patience=2", "--config.steps=400")
    best = ("--config.checkpoint.best=test/accuracy", "--config.eval.batch_size=128")
    for _ in range(2):
        with training(tmp_path / "run", 2, 1, *still, *stop, *best) as two:
            assert end(two) == [0, 0], [p.log.read_text() for p in two]
        steps = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
        assert steps == ["6"]
    assert max(lines(tmp_path / "run")) == 6
    assert "at step 6 already" in two[0].log.read_text()
