# SPDX-License-Identifier: Apache-2.0
"""The script of a TPU VM, executed with real shells as hosts and a `localglobal` of a line."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

import pytest
import standins

from localglobal_jax.launch import tpu_vm

SYSTEM = "/usr/local/bin:/usr/bin:/bin"
SAVES = 'trap "exit 42" TERM; echo training; touch "$HOME/ready"; while :; do sleep 0.05; done'


class Machines:
    """Hosts of one run in `place`, and the script that starts the run on them."""

    def __init__(self, place: pathlib.Path, hosts: int = 1):
        self.place, self.homes, self.processes = place, [], []
        for i in range(hosts):
            (place / f"bin{i}").mkdir(parents=True)
            path = f"{place}/bin{i}:{SYSTEM}"
            self.homes.append(standins.host(place, i, path, PLACE=str(place)))
        (place / "tools").mkdir()
        standins.tool(place / "tools", "gcloud", standins.GCLOUD)

    def localglobal(self, body: str, hosts: tuple[int, ...] = (0,)) -> "Machines":
        for i in hosts:
            counted = f'echo "$*" >> "$HOME/started"\n{body}'
            standins.tool(self.place / f"bin{i}", "localglobal", counted)
        return self

    def start(self, setup: str | None = None, env=None, outside=None):
        """Starts the script; `outside`: variables of its own, those of `env` by default."""
        command, where = ("localglobal", "train"), {"zone": "z", "accelerator": "v4-8"}
        text = tpu_vm.script("n", command, setup=setup, env=env or {}, **where)
        (self.place / "n.sh").write_text(text)
        self.log = self.place / "log.txt"
        own = {
            "PATH": f"{self.place}/tools:{SYSTEM}", "HOME": str(self.place),
            "PLACE": str(self.place), "LOCALGLOBAL_POLL": "0.1",
        }  # fmt: skip
        own |= (env if outside is None else outside) or {}
        with self.log.open("a") as log:
            process = subprocess.Popen(
                ["bash", self.place / "n.sh"], env=own, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def code(self, **given) -> int:
        return self.start(**given).wait(60)

    @property
    def kept(self) -> bool:
        return (self.place / "state").exists()

    def starts(self, host: int = 0) -> int:
        file = self.homes[host] / "started"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def machines(tmp_path):
    made = []

    def make(hosts: int = 1) -> Machines:
        made.append(Machines(tmp_path / str(len(made)), hosts))
        return made[-1]

    yield make
    for process in [process for run in made for process in run.processes]:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for file in tmp_path.glob("*/host*/.localglobal/pid"):  # none of them survives
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ENV = {"NOTE": "it's a 'test'", "HF_TOKEN": "hunter 2's"}
RIGHT = 'test "$HF_TOKEN" = "hunter 2\'s" && test "$NOTE" = "it\'s a \'test\'"'


@pytest.mark.parametrize(
    ("body", "code", "kept"),
    [
        (RIGHT, 0, False),
        ("exit 2", 2, False),
        ("exit 3", 3, False),
        ("exit 1", 1, True),
        ("exit 42", 42, True),
        ("kill -9 $$", 137, True),
        ('echo SUSPENDED > "$PLACE/state"; exit 1', 42, True),
    ],
)
def test_the_codes_of_a_run_are_passed_on_and_decide_about_the_machines(body, code, kept, machines):
    run = machines().localglobal(body)
    assert run.code(env=ENV) == code, run.said()
    assert run.kept == kept and run.starts() == 1
    assert (run.place / "calls").read_text().count(" create n ") == 1


def test_sigterm_arrives_at_the_run(machines):
    run = machines(2).localglobal(SAVES, (0, 1))
    process = run.start()
    wait_for(lambda: all((home / "ready").exists() for home in run.homes))
    process.terminate()
    assert process.wait(60) == 42
    assert run.kept and "training" in run.said()


# ------------------------------------------------------------------------------ the setup


@pytest.mark.parametrize(
    "setup",
    [
        "false && true",
        "git clone -q /nowhere lg && cd lg",
        "false; true",
        "exit 0",
        "exit 2",
        "if",
        "(exit 2)",
        "no-such-command",
        "true\nfalse\ntrue",
        "set +e; true; false # a comment",
        "cd /nowhere",
        "return 3",
    ],
)
def test_a_setup_that_fails_starts_nothing_and_deletes_nothing(setup, machines):
    run = machines().localglobal("exit 0")
    assert run.code(setup=setup) == tpu_vm.NOT_READY, run.said()
    assert run.kept and run.starts() == 0


def test_a_setup_that_fails_on_one_host_starts_no_host(machines):
    run = machines(2).localglobal("exit 0", (0, 1))
    assert run.code(setup='test "${HOME: -1}" = 0') == tpu_vm.NOT_READY
    assert run.kept and run.starts(0) == run.starts(1) == 0


def test_the_run_gets_the_folder_and_the_variables_of_the_setup(machines):
    run = machines()
    standins.tool(run.place / "bin0", "localglobal", "exit 9")
    setup = """mkdir -p ~/lg/bin && cd ~/lg
    printf '#!/bin/bash\\necho "$PWD $FOUND $HF_TOKEN" > ~/seen' > bin/localglobal
    chmod +x bin/localglobal; export PATH=~/lg/bin:$PATH FOUND="a 'b"
    sleep 100 &"""
    assert run.code(setup=setup, env={"HF_TOKEN": "hunter2"}) == 0, run.said()
    home = run.homes[0]
    assert (home / "seen").read_text() == f"{home}/lg a 'b hunter2\n"
    files = [f.read_text() for f in (home / ".localglobal").iterdir() if f.is_file()]
    assert not any("hunter2" in text for text in files)


def test_without_localglobal_on_a_host(machines):
    run = machines()
    assert run.code() == tpu_vm.NOT_READY
    assert run.kept and "--setup" in run.said()


# ------------------------------------------------------------------------- the connection


def cut(run: Machines, host: int = 0) -> None:
    """Ends the ssh connection of a host, and what runs in its foreground."""
    home = run.homes[host]
    (home / "cut").touch()
    os.killpg(int((home / "ssh").read_text()), signal.SIGKILL)


FINISHES = 'touch "$HOME/ready"; until [ -e "$PLACE/go" ]; do sleep 0.05; done; echo last; exit '


@pytest.mark.parametrize("code", [0, 1, 2, 42])
def test_a_lost_connection_finds_the_run_again(code, machines):
    run = machines(2).localglobal(f"{FINISHES}{code}", (0, 1))
    process = run.start()
    wait_for(lambda: all((home / "ready").exists() for home in run.homes))
    cut(run, 1)
    wait_for(lambda: "was started on" in run.said())
    (run.place / "go").touch()
    assert process.wait(60) == code, run.said()
    assert run.starts(0) == run.starts(1) == 1
    assert run.kept == (code in (1, 42)) and run.said().count("last") == 2


def test_a_run_that_ended_without_a_connection_is_not_started_again(machines):
    run = machines().localglobal(f"{FINISHES}42")
    process = run.start()
    wait_for((run.homes[0] / "ready").exists)
    text = (run.place / "tools" / "gcloud").read_text()
    standins.tool(run.place / "tools", "gcloud", text.replace("  ssh)", "  ssh) exit 255 ;;\n xx)"))
    cut(run)
    (run.place / "go").touch()
    wait_for((run.homes[0] / ".localglobal" / "code").exists)
    standins.tool(run.place / "tools", "gcloud", text)
    assert process.wait(60) == 42, run.said()
    assert run.starts() == 1


def test_a_launcher_that_was_killed_finds_the_run_again(machines):
    run = machines().localglobal(f"{FINISHES}0")
    process = run.start()
    wait_for((run.homes[0] / "ready").exists)
    os.killpg(process.pid, signal.SIGKILL)
    again = run.start(setup="exit 1")  # not while the run goes on
    wait_for(lambda: "was started on" in run.said())
    (run.place / "go").touch()
    assert again.wait(60) == 0, run.said()
    assert run.starts() == 1 and not run.kept


def test_hosts_that_cannot_be_reached_are_kept(machines):
    run = machines().localglobal("exit 0")
    text = standins.GCLOUD.replace("  ssh)", "  ssh) exit 255 ;;\n xx)")
    standins.tool(run.place / "tools", "gcloud", text)
    assert run.code() == tpu_vm.CONNECTION_LOST
    assert run.kept and run.starts() == 0


def test_an_error_of_gcloud_is_not_a_wrong_config(machines):
    run = machines().localglobal("exit 0")
    text = standins.GCLOUD.replace("  ssh)", "  ssh) exit 2 ;;\n xx)")
    standins.tool(run.place / "tools", "gcloud", text)
    assert run.code() == 1 and run.kept


# ---------------------------------------------------------------------------- the request


@pytest.mark.parametrize("becomes", ["gone", "DELETING", "SUSPENDED", "FAILED"])
def test_a_request_that_vanishes_ends_the_wait(becomes, machines):
    run = machines().localglobal("exit 0")
    (run.place / "state.new").write_text("WAITING_FOR_RESOURCES\n")
    process = run.start()
    wait_for(lambda: "WAITING_FOR_RESOURCES" in run.said())
    if becomes == "gone":
        (run.place / "state").unlink()
    else:
        (run.place / "state").write_text(f"{becomes}\n")
    assert process.wait(30) == (1 if becomes == "FAILED" else 42), run.said()
    assert ("GONE" if becomes == "gone" else becomes) in run.said() and run.starts() == 0


def test_a_request_that_is_being_deleted_is_made_again(machines):
    run = machines().localglobal("exit 0")
    (run.place / "state").write_text("DELETING\n")
    process = run.start()
    wait_for(lambda: "DELETING" in run.said())
    (run.place / "state").unlink()
    assert process.wait(30) == 0 and run.starts() == 1


def test_a_describe_that_fails_is_not_a_request_that_is_gone(machines):
    run = machines().localglobal("exit 0")
    standins.tool(run.place / "tools", "gcloud", 'echo "ERROR: no network" >&2; exit 1')
    assert run.code() == tpu_vm.CONNECTION_LOST
    assert "no network" in run.said()


def test_a_stop_while_the_run_is_being_connected_arrives(machines):
    run = machines(2).localglobal(SAVES, (0, 1))
    stopped = 'until [ -e "$PLACE/host1/.localglobal/stop" ]; do sleep 0.05; done'
    slow = f'  ssh)\n    case "$*" in *"set -m"*) touch "$PLACE/connecting"; {stopped} ;; esac\n'
    standins.tool(run.place / "tools", "gcloud", standins.GCLOUD.replace("  ssh)\n", slow))
    process = run.start()
    wait_for((run.place / "connecting").exists)
    process.terminate()
    assert process.wait(60) in (42, 128 + signal.SIGTERM), run.said()  # before or after its trap
    assert run.kept


def test_variables_of_the_run_change_no_tool_of_the_launcher(machines):
    run = machines().localglobal('test "$HERE" = host && test "$HF_TOKEN" = hunter2')
    outside = dict(HF_TOKEN="hunter2")
    path = f"{run.place}/bin0:{SYSTEM}"  # without gcloud
    env = {"PATH": path, "HERE": "host", **outside}
    assert run.code(env=env, outside=outside) == 0, run.said()


def test_a_gcloud_that_is_not_there_is_no_request_that_is_gone(machines):
    run = machines().localglobal("exit 0")
    (run.place / "tools" / "gcloud").unlink()
    assert run.code() == tpu_vm.CONNECTION_LOST
