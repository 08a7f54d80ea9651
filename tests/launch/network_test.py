# SPDX-License-Identifier: Apache-2.0
"""A host that the network loses for 90 s: two hosts in network namespaces, joined by a bridge."""

import contextlib
import os
import pathlib
import re
import subprocess
import time

import pytest
import standins
from launch.two_hosts_test import Desk

CUT = 90.0  # seconds


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def network(tmp_path):
    """Two hosts, ``node-a`` 10.77.0.1 and ``node-b`` 10.77.0.2: (addresses, words, port of b)."""
    mark = f"lg{os.getpid() % 10000}"
    spaces = [f"{mark}a", f"{mark}b"]
    try:
        ip("link", "add", f"{mark}br", "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    with contextlib.ExitStack() as made:
        made.callback(ip, "link", "del", f"{mark}br", check=False)
        ip("link", "set", f"{mark}br", "up")
        hosts, names = [], tmp_path / "hosts"
        names.write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")
        for i, space in enumerate(spaces):
            ip("netns", "add", space)
            made.callback(ip, "netns", "del", space, check=False)
            ip("link", "add", f"{mark}p{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            made.callback(ip, "link", "del", f"{mark}p{i}", check=False)
            ip("link", "set", f"{mark}p{i}", "master", f"{mark}br", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            script = f"""hostname node-{"ab"[i]}; mount --bind {names} /etc/hosts; exec "$@\""""
            inside = f"""unshare --uts --mount bash -c '{script}' -- "$@\""""
            standins.tool(tmp_path, f"enter{i}", f"exec ip netns exec {space} {inside}")
            hosts.append((f"10.77.0.{i + 1}", (str(tmp_path / f"enter{i}"),)))
        yield hosts, f"{mark}p1", f"{mark}br"


@pytest.mark.slow
def test_a_host_without_network_for_90_s(tmp_path, network, installed, data_dir):
    """Both hosts end with the other's name; the requeued task waits for the network, goes on."""
    hosts, port, bridge = network
    desk = Desk(tmp_path / "desk", installed, data_dir, hosts)
    workdir = desk.place / "shared"

    def text() -> str:
        return "".join(f.read_text() for f in workdir.glob("runs-000-*/log.txt"))

    with contextlib.closing(desk):
        words = ("--backend=slurm", "--nodes=2", "--config.steps=1000")
        assert desk.sweep(*words, workdir=str(workdir)).wait(300) == 0, desk.log.read_text()
        desk.wait_for(lambda: re.search(r"step +2\d\d/1000", text()), "shared/**/*.txt")
        ip("link", "set", port, "nomaster")
        cut = time.monotonic()
        desk.wait_for(desk.codes, "shared/**/*.txt")
        assert time.monotonic() - cut < CUT
        before = text()
        for number, name in enumerate(("node-a", "node-b")):
            assert f"host {number} ({name}) is lost: it has been silent for 60 s" in before
        time.sleep(max(0.0, cut + CUT - time.monotonic()))
        ip("link", "set", port, "master", bridge)
        desk.wait_for((desk.place / "idle").exists, "shared/**/*.txt", 500)
        assert desk.codes() == ["42", "0"], desk.said("shared/**/*.txt")
        resumed = re.search(r"resumed at step ([\d,]+)", text())
        assert resumed and int(resumed[1]) >= 100  # the save at 200 may not have been complete
        (run,) = pathlib.Path(workdir).glob("runs-000-*")
        assert (run / "checkpoints" / "1000").is_dir()
