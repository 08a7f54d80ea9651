# SPDX-License-Identifier: Apache-2.0
"""Three joined processes without a model: who names whom when one of them is lost or ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from localglobal_jax.parallel import rendezvous

HOST = """
import sys, time
from localglobal_jax.parallel import multihost, rendezvous, watch

watch.GRACE = 1.0
rendezvous.start(rendezvous.Cluster(sys.argv[1], 3, int(sys.argv[2])), 60)
print("joined", flush=True)
for line in sys.stdin:
    exec(line)
"""


@contextlib.contextmanager
def joined():
    """Three processes; each executes the lines that are written to it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "LOCALGLOBAL_HEARTBEAT": "4"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(i)], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]  # fmt: skip
    try:
        assert [host.stdout.readline() for host in hosts] == ["joined\n"] * 3
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


def end(host):
    """The exit code of a host, and its stderr: jax's own threads may write after our line."""
    _, said = host.communicate(timeout=600)
    return host.returncode, said


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("sent", "how"),
    [(signal.SIGKILL, "closed its connection"), (signal.SIGSTOP, "silent for 4 s")],
)
def test_a_lost_host_is_named_by_all_others(lost, sent, how):
    with joined() as hosts:
        hosts[lost].send_signal(sent)
        for i in {0, 1, 2} - {lost}:
            code, said = end(hosts[i])
            assert code == 42, said
            assert f"host {lost} ({socket.gethostname()}) is lost" in said and how in said


def test_a_host_that_ends_with_an_error_ends_the_others_with_its_name():
    with joined() as hosts:
        print("multihost.leave(2)", file=hosts[1].stdin, flush=True)
        for i in (0, 2):
            code, said = end(hosts[i])
            assert code == 42 and "host 1 " in said and "ended with exit code 2" in said


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "1 min"])
def test_a_wrong_heartbeat_is_named_before_anything_waits(text, monkeypatch):
    monkeypatch.setenv("LOCALGLOBAL_HEARTBEAT", text)
    with pytest.raises(ValueError, match=f"LOCALGLOBAL_HEARTBEAT={text}:"):
        rendezvous.start(rendezvous.Cluster("localhost:1", 2, 1), 60)


def test_hosts_that_are_done_may_end_at_different_times():
    with joined() as hosts:
        for i, seconds in enumerate((0, 2, 3)):
            words = f"time.sleep({seconds}); multihost.finished(0); raise SystemExit(0)"
            print(words, file=hosts[i].stdin, flush=True)
        for host in hosts:
            _, said = host.communicate(timeout=600)
            assert host.returncode == 0 and "lost" not in said
