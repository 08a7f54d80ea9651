# SPDX-License-Identifier: Apache-2.0
"""The commands that each back end makes, executed as they are: two hosts, an installed wheel.

Only `gcloud`, SLURM's tools and `xpk` are stand-ins (`standins`): they run what they are given in a
real shell with an empty environment. JAX joins two real processes, which train on the digits.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import gcs_server
import pytest
import standins

from localglobal_jax.checkpoints import objects
from localglobal_jax.checkpoints.workdir import absolute
from localglobal_jax.launch import status, tpu_vm

SYSTEM = "/usr/local/bin:/usr/bin:/bin"
# What is compiled runs for a second: no time for optimisation, as in the rest of the suite.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
RUNS = """
from localglobal_jax.config import loading
from localglobal_jax.config.sweeps import product


def get_config(arg=None):
    config = loading.load(CONFIG + ":size=tiny")
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.data.update(dir=DATA, eval_splits=("test[:16]",))
    config.batch_size, config.steps, config.optim.warmup_steps = 16, 300, 1
    config.checkpoint.update(best=None, every=100)
    config.eval = dict(every=0)
    config.log = dict(every=1, tensorboard=False)
    return config


def sweep():
    yield {"seed": 1}


def sweep_wrong():
    yield {"data.name": "imagenet2012"}
"""
ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "configs/sweeps.md"


class Desk:
    """A desk with the tools of the clouds, and two hosts; every one has its own environment."""

    def __init__(self, place, installed, data_dir, hosts=(("localhost", ()),) * 2):
        """`hosts`: the address of each, and words before every command on it."""
        self.place, self.installed = place, installed
        self.started: list[subprocess.Popen] = []
        (place / "repository").mkdir(parents=True)
        text = RUNS.replace("CONFIG", repr(str(ROOT / "configs/coatnet_digits.py")))
        (place / "repository" / "runs.py").write_text(text.replace("DATA", repr(data_dir)))
        for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "runs")):
            who = ("-c", "user.name=a", "-c", "user.email=a@b")
            subprocess.run(["git", *who, *words], cwd=place / "repository", check=True)
        nodes = [address for address, _ in hosts]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.homes = []
        for i, (_, prefix) in enumerate(hosts):
            on_a_slice = {  # as on a slice of GKE
                "JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_ID": str(i),
                "TPU_WORKER_HOSTNAMES": ",".join(nodes), "MEGASCALE_NUM_SLICES": "1",
                "MEGASCALE_SLICE_ID": "0", "MEGASCALE_COORDINATOR_ADDRESS": nodes[0],
                # this machine instead of a TPU's
                "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port), "NPROC": "4",
                "XLA_FLAGS": QUICK,
            }  # fmt: skip
            self.homes.append(standins.host(place, i, SYSTEM, prefix, **on_a_slice))
        (place / "nodes").write_text(" ".join(nodes))
        tools = place / "tools"
        tools.mkdir()
        standins.tool(tools, "gcloud", standins.GCLOUD)
        for name in ("sbatch", "scontrol", "scancel"):
            standins.tool(tools, name, getattr(standins, name.upper()))
        standins.tool(tools, "squeue", "")
        standins.program(tools, "srun", standins.SRUN)
        standins.program(tools, "xpk", standins.XPK)
        self.environment = {
            "PATH": f"{tools}:{installed}:{SYSTEM}", "HOME": str(place), "PLACE": str(place),
            "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port), "LOCALGLOBAL_POLL": "1",
            "CONTAINER": standins.CONTAINER.replace("sleep 5", "sleep 1"), "NPROC": "4",
            "XLA_FLAGS": QUICK,
        }  # fmt: skip

    def sweep(self, *words: str, workdir: str, **env: str) -> subprocess.Popen:
        words = ("sweep", "--config=runs.py", f"--workdir={workdir}", *words)
        self.log = self.place / "desk.txt"
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [self.installed / "localglobal", *words],
                cwd=self.place / "repository",
                env={**self.environment, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def setup(self) -> str:
        """The shell code that prepares a host: it may run twice."""
        clone = f"test -d lg || git clone -q file://{self.place}/repository lg"
        return f"{clone}; cd lg; . {self.installed}/activate"

    def use_as_image(self) -> None:
        """Makes containers of the hosts: the config is in their folder, the wheel on their PATH."""
        for home in self.homes:
            shutil.copy(self.place / "repository" / "runs.py", home)
            own = f"PATH={self.installed}:{SYSTEM}".encode()
            words = (home / "words").read_bytes().replace(f"PATH={SYSTEM}".encode(), own)
            (home / "words").write_bytes(words)

    def codes(self) -> list[str]:
        """Returns the exit codes of the tasks of SLURM that have ended."""
        file = self.place / "ended"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.rpartition(" ")[2] for line in lines]

    def said(self, pattern: str) -> str:
        return "\n".join(f"== {f}\n{f.read_text()}" for f in sorted(self.place.glob(pattern)))

    def wait_for(self, found, pattern: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            alive = time.monotonic() < deadline and self.started[-1].poll() in (None, 0)
            assert alive, self.log.read_text() + self.said(pattern)
            time.sleep(0.1)

    def close(self) -> None:
        """Ends every process that has this desk's place in its environment or its arguments."""
        for process in self.started:
            process.kill()
            process.wait()
        mark = os.fsencode(str(self.place))
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                texts = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
                if mark in texts and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def desk(tmp_path, installed, data_dir):
    with contextlib.closing(Desk(tmp_path / "desk", installed, data_dir)) as made:
        yield made


@pytest.fixture
def options(request, desk):
    """``backend -> (words, workdir, variables)`` of a sweep; a bucket for TPUs, else a folder."""

    def of(backend: str) -> tuple[list[str], str, dict[str, str]]:
        if backend == "slurm":
            return ["--backend=slurm", "--nodes=2"], str(desk.place / "shared"), {}
        url = request.getfixturevalue("gcs")
        store = gcs_server.environment(url)
        words = [f"--backend={backend}", "--tpu_type=v5p-16", *(f"--env={name}" for name in store)]
        if backend == "xpk":
            desk.use_as_image()
            words += ["--cluster=c", "--image=i"]
        else:
            words += ["--zone=z", f"--setup={desk.setup()}"]
        return words, f"gs://{gcs_server.new_bucket(url)}/runs", store

    return of


def saved(workdir: str) -> set[int]:
    """The complete steps of the run in a bucket."""
    bucket, _, prefix = workdir.removeprefix("gs://").partition("/")
    url = os.environ["STORAGE_EMULATOR_HOST"]
    page = json.loads(gcs_server.request(f"{url}/storage/v1/b/{bucket}/o?prefix={prefix}"))
    found = [re.search(r"/checkpoints/(\d+)/files.json$", item["name"]) for item in page["items"]]
    return {int(name[1]) for name in found if name}


def config_of(root: str) -> str:
    """Returns the config file that the only run in `root` records."""
    (name,) = (name for name in objects.folders(absolute(root)) if "runs-000-" in name)
    return status.environment(f"{root}/{name}")["config"]


# Each: setup, join, train; a host that is asked to stop stops both; the restart goes on, to the
# end, by the back end's own rule.


# In the suite: the scripts (tpu_vm_test.py), two hosts that train and stop (multihost_test.py), and
# two that save in a bucket (manager_test.py).
@pytest.mark.slow
def test_tpu_vm(desk, options):
    words, workdir, store = options("tpu-vm")
    sweep = desk.sweep(*words, workdir=workdir, **store)
    log = desk.homes[0] / ".localglobal" / "log.txt"
    logs = "host*/.localglobal/log.txt"
    desk.wait_for(lambda: "step   3/300" in desk.said(logs), logs)
    os.kill(int((desk.homes[1] / ".localglobal" / "pid").read_text()), signal.SIGTERM)
    assert sweep.wait(600) == 0, desk.log.read_text() + desk.said(logs)
    assert "restart" in desk.log.read_text() and "1 of 1 done" in desk.log.read_text()
    for i, home in enumerate(desk.homes):
        text = (home / ".localglobal" / "log.txt").read_text()
        assert text.count(f"{i} of 2: all are here") == 2 and "the state is saved" in text
    assert "resumed at step" in log.read_text() and 300 in saved(workdir)
    assert not (desk.place / "state").exists()
    assert config_of(workdir) == "runs.py"


@pytest.mark.slow
def test_xpk(desk, options):
    words, workdir, store = options("xpk")
    assert desk.sweep(*words, workdir=workdir, **store).wait(300) == 0, desk.log.read_text()
    logs = "runs-000-*/*"
    desk.wait_for(lambda: "step   3/300" in desk.said(logs), logs)
    os.kill(int((desk.homes[1] / "pod").read_text()), signal.SIGTERM)
    (job,) = desk.place.glob("runs-000-*")
    desk.wait_for((job / "ended").exists, logs)
    assert (job / "attempts").read_text() == "[42, 42]\n[0, 0]\n", desk.said(logs)
    assert "resumed at step" in desk.said(logs) and 300 in saved(workdir)
    assert config_of(workdir) == "runs.py"


@pytest.mark.slow
def test_slurm(desk, options):
    words, workdir, _ = options("slurm")
    sweep = desk.sweep(*words, "--env=NOTE=it's", workdir=workdir)
    assert sweep.wait(300) == 0, desk.log.read_text()
    logs = "shared/runs-000-*/log.txt"
    desk.wait_for(lambda: "step   3/300" in desk.said(logs), "shared/**/*.txt")
    os.kill(int((desk.place / "task1.pid").read_text()), signal.SIGTERM)
    desk.wait_for((desk.place / "idle").exists, "shared/**/*.txt")
    assert desk.codes() == ["42", "0"], desk.said("shared/**/*.txt")
    assert "resumed at step" in desk.said(logs) and desk.said(logs).count("of 2: all are here") == 4
    (run,) = pathlib.Path(workdir).glob("runs-000-*")
    assert (run / "checkpoints" / "300").is_dir()
    assert config_of(workdir) == "runs.py"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu-vm", "xpk", "slurm"])
def test_a_run_that_only_the_hosts_find_wrong_is_given_up(backend, desk, options):
    """The desk does not see that the hosts have no such data set: exit code 2, no restart."""
    words, workdir, store = options(backend)
    sweep = desk.sweep(*words, "--sweep=wrong", workdir=workdir, **store)
    assert sweep.wait(300) == (backend == "tpu-vm"), desk.log.read_text()
    if backend == "tpu-vm":
        assert "exit code 2" in desk.log.read_text() and not (desk.place / "state").exists()
        logs = "host*/.localglobal/log.txt"
    elif backend == "xpk":
        logs = "runs-*/*"
        desk.wait_for(lambda: list(desk.place.glob("runs-*/ended")), logs)
        assert "\n[2, 2]\n" in desk.said("runs-*/attempts")
    else:
        logs = "shared/**/*.txt"
        desk.wait_for((desk.place / "idle").exists, logs)
        assert desk.codes() == ["2"], desk.said(logs)
    assert desk.said(logs).count("set data.dir") == 2 and desk.said(logs).count("of 2: all") == 2


SETUP = re.search(
    r"^cat > setup.sh <<'END'\n(.*?)^END$", PAGE.read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.slow
def test_the_setup_of_the_page(tmp_path):
    """On a host whose ``python3`` is 3.10, as on the images of TPU VMs; twice.

    ``LOCALGLOBAL_TEST_PYTHON310`` names a folder with a Python 3.10, if the PATH has none.
    """
    old = os.environ.get("LOCALGLOBAL_TEST_PYTHON310") or os.path.dirname(
        shutil.which("python3.10") or pytest.skip("needs a Python 3.10")
    )
    assert SETUP
    passed_on = {k: v for k, v in os.environ.items() if re.match("SSL_CERT|PIP_", k)}
    home = standins.host(tmp_path, 0, f"{old}:{SYSTEM}", (), **passed_on)
    words = [os.fsdecode(w) for w in (home / "words").read_bytes().split(b"\0")[:-1]]
    code = tpu_vm.prepare(SETUP[1].replace("REPOSITORY", f"file://{ROOT}"))
    for _ in range(2):
        done = subprocess.run([*words, "bash", "-c", code], check=False, timeout=900)
        assert done.returncode == 0
    run = ". ~/.localglobal/environment; localglobal --version; python --version; pwd"
    said = subprocess.run(
        [*words, "bash", "-c", run], check=True, capture_output=True, text=True, timeout=600
    ).stdout.split()
    assert said[0] == "localglobal_jax" and said[3] >= "3.11" and said[4] == f"{home}/lg"
