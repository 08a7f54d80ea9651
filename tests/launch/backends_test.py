# SPDX-License-Identifier: Apache-2.0
"""Back ends: golden argument lists, option checks, and scripts executed with fake tools."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import gcs_server
import pytest
from etils import epath

from localglobal_jax.cli.main import main, parser
from localglobal_jax.launch import (
    backends,
    execute,
    expand,
    local,
    pool,
    shell,
    slurm,
    status,
    tpu,
    tpu_vm,
    xpk,
)
from localglobal_jax.launch.backend import Launch, Option, Request, Started, Target
from localglobal_jax.launch.exit_codes import ExitCode

LAYOUTS = str(pathlib.Path(__file__).parents[2] / "experiments/coatnet_layouts/sweep.py")
DIGITS = str(pathlib.Path(__file__).parents[2] / "configs/coatnet_digits.py")
COMMAND = ("localglobal", "train", "--config.model.depths=(1, 1)", "--workdir", "gs://b/it's")
ENV = {"NOTE": "it's a 'test'", "HF_TOKEN": "hunter 2's"}


def test_xpk():
    assert xpk.arguments(
        "layouts-000-1f2e3d4c",
        COMMAND,
        cluster="pod",
        tpu_type="v5litepod-16",
        image="gcr.io/p/i:1",
        slices=2,
        project="p",
        zone="z",
        env={"A": "b c"},
    ) == [
        *("xpk", "workload", "create", "--workload=layouts-000-1f2e3d4c", "--cluster=pod"),
        *("--project=p", "--zone=z", "--tpu-type=v5litepod-16", "--num-slices=2"),
        *("--docker-image=gcr.io/p/i:1", "--priority=medium", "--max-restarts=100"),
        *("--restart-on-exit-codes=42", "--termination-grace-period-seconds=120", "--env=A=b c"),
        "--command=exec localglobal train '--config.model.depths=(1, 1)' --workdir 'gs://b/it'\"'\"'s'",
    ]


def test_queued_resources():
    where = {"zone": "z", "project": "p"}
    made = tpu_vm.create("n", accelerator="v5litepod-16", spot=True, **where)
    assert made == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "n", "--node-id=n"),
        *("--zone=z", "--project=p", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--quiet"),
    ]
    assert tpu_vm.ssh("n", **where) == [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "n"),
        *("--zone=z", "--project=p", "--worker=all"),
    ]


@pytest.mark.parametrize(
    ("name", "slices", "devices", "hosts"),
    [
        ("v5e-256", 1, 256, 64),
        ("v5litepod-8", 1, 8, 1),
        ("v5e-256", 2, 512, 128),
        ("v5p-128", 1, 64, 16),
        ("v4-8", 1, 4, 1),
        ("v3-32", 1, 32, 4),
        ("v6e-4", 4, 16, 4),
    ],
)
def test_tpu_names(name, slices, devices, hosts):
    assert tpu.target(name, slices) == (devices, hosts)


@pytest.mark.parametrize("name", ["v5e", "v8-4", "v5e:4x4", "cpu:8", "h100-8", "v4-1"])
def test_wrong_tpu_names(name):
    with pytest.raises(ValueError, match=r"topology|--tpu_type"):
        tpu.target(name)


def test_xpk_gets_the_cloud_s_name_of_a_type():
    words = xpk.arguments("n", ["c"], cluster="c", tpu_type="v5e-16", image="i")
    assert "--tpu-type=v5litepod-16" in words


def test_environments():
    outside = {"HF_TOKEN": "x", "B": "y"}
    assert shell.environment(["A=1=2", "HF_TOKEN"], outside) == {"A": "1=2", "HF_TOKEN": "x"}
    with pytest.raises(ValueError, match="--env C:"):
        shell.environment(["C"], outside)
    with pytest.raises(ValueError, match="--env 1=2:"):
        shell.environment(["1=2"], outside)
    given = {"WANDB_API_KEY": "a", "my_secret": "b", "db_password": "c", "x_token": "d", "LR": "e"}
    assert list(shell.masked(given).values()) == ["***", "***", "***", "***", "e"]


def arguments(*words):
    return parser().parse_args(["sweep", "--config", LAYOUTS, "--workdir", "gs://b/r", *words])


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--cluster=c",), "--cluster.*xpk"),
        (("--backend=xpk", "--cluster=c"), "xpk.*--image"),
        (("--backend=tpu-vm", "--tpu_type=v4-8", "--slots=1"), "tpu-vm.*--zone"),
        (("--backend=slurm", "--cores_per_slot=1"), "--cores_per_slot.*local"),
        (("--backend=slurm", "--retries=0"), "--retries.*local.*tpu-vm"),
        (("--slots=0",), "--slots 0: .*1"),
        (("--devices=0",), "--devices 0: .*1"),
        (("--retries=-1",), "--retries -1: .*0"),
    ],
)
def test_options_of_other_back_ends(words, option):
    with pytest.raises(ValueError, match=option):
        backends.check(arguments(*words))


def test_a_back_end_is_one_module_and_one_line_of_the_registry(monkeypatch, capsys):
    """A module that is added to the registry has options, help, checks and a launch."""

    class Cloud:
        NAME, REQUIRED = "cloud", ("region",)
        OPTIONS = (Option("region", "region of the cloud"), Option("copies", "copies", least=2))
        check = staticmethod(lambda args: None)
        target = staticmethod(lambda args: Target(3))
        launch = staticmethod(lambda request: Launch({}, {}, {}))
        start = staticmethod(lambda request, environment, say: Started(ExitCode.DONE, {}))

    monkeypatch.setattr(backends, "MODULES", (*backends.MODULES, Cloud))
    monkeypatch.setitem(backends.BACKENDS, "cloud", Cloud)
    args = arguments("--backend=cloud", "--region=r", "--copies=2")
    backends.check(args)
    assert backends.target(args) == (3, 1)
    for words, named in (
        (("--backend=cloud",), "--region"),
        (("--backend=cloud", "--region=r", "--copies=1"), "--copies 1"),
        (("--region=r",), "--region.*cloud"),
    ):
        with pytest.raises(ValueError, match=named):
            backends.check(arguments(*words))
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "region of the cloud" in capsys.readouterr().out


def test_a_shared_option_means_the_same_to_every_back_end():
    seen = {}
    for module in backends.MODULES:
        for option in module.OPTIONS:
            assert seen.setdefault(option.name, option) == option
        assert set(module.REQUIRED) <= {option.name for option in module.OPTIONS}


def test_the_gpus_of_the_runs_are_those_of_their_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    args = parser().parse_args(
        ["sweep", "--config=x", "--workdir=r", "--env=CUDA_VISIBLE_DEVICES=2"]
    )
    assert local.target(args) == Target(1)


def test_a_slot_of_two_gpus_is_a_target_of_two_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert local.target(arguments("--slots=2")) == (2, 1)
    assert local.target(arguments("--gpus_per_slot=0")) is None
    with pytest.raises(ValueError, match="--slots"):
        local.check(arguments("--slots=5"))


XPK = ("--backend=xpk", "--cluster=c", "--image=i", "--tpu_type=v5litepod-16")
TPU_VM = ("--backend=tpu-vm", "--zone=z", "--tpu_type=v5litepod-16")


@pytest.mark.parametrize("words", [(), ("--backend=slurm",), XPK, TPU_VM], ids=str)
def test_a_run_is_started_with_the_config_as_it_was_given(words):
    """So that it records the file from which the sweep was started."""
    spec = f"{LAYOUTS}:size=tiny"
    found = expand.expand(spec, "gs://b/r")
    args = arguments(*words)
    launch = backends.BACKENDS[args.backend].launch(Request(args, found, found.runs[:1], {}))
    (run,) = launch.shown
    for text in (launch.shown[run][-1], *launch.files.values()):
        assert f"--config {spec} --workdir gs://b/r/{run}" in text


@pytest.mark.parametrize("words", [XPK, TPU_VM, ("--backend=slurm", "--gpus=2")])
def test_secrets_are_neither_printed_nor_written(words, tmp_path, monkeypatch, capsys, gcs):
    monkeypatch.setenv("HF_TOKEN", ENV["HF_TOKEN"])
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    bucket = f"gs://{gcs_server.new_bucket(gcs)}/r"
    root = str(tmp_path / "root") if "slurm" in words[0] else bucket
    command = ["sweep", f"--config={DIGITS}", "--sweep=layouts", f"--workdir={root}"]
    command += ["--only", "0", *words]
    command += ["--env=HF_TOKEN", f"--env=NOTE={ENV['NOTE']}"]
    assert main([*command, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "hunter" not in printed and "***" in printed
    assert not list(tmp_path.iterdir())
    assert main([*command, f"--out={tmp_path / 'out'}"]) == 0
    (file,) = (tmp_path / "out").iterdir()
    text = file.read_text()
    assert "hunter" not in text and "${HF_TOKEN:?" in text
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    assert not (tmp_path / "root").exists()


# ------------------------------------------------ scripts, executed with fake tools


def tool(folder, name, body):
    file = folder / name
    file.write_text("#!/bin/bash\n" + body)
    file.chmod(0o755)


def executed(script, tools, env, wait_for=None):
    """Runs a script; sends it SIGTERM once the file `wait_for` is there."""
    path = f"{tools}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", script], env={**os.environ, "PATH": path, **env})
    if wait_for:
        while not wait_for.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
    return process.wait(600)


SAVES = """trap 'exit 42' TERM; touch "$PLACE/ready"; while :; do command -p sleep 0.05; done"""


@pytest.mark.parametrize(
    ("code", "deleted"), [(0, True), (1, True), (2, True), (78, False), (255, False)]
)
def test_machines_are_deleted_for_a_run_that_ended_but_not_for_a_failed_start(
    code, deleted, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_vm, "script", lambda *_, **__: f"exit {code}")
    monkeypatch.setattr(pool, "progress", lambda run: (lambda: None, 9))  # no bucket
    failing = "echo PERMISSION_DENIED; exit 1"
    tool(tmp_path, "gcloud", f'echo "$*" >> {tmp_path}/calls; {failing}')
    run, said = expand.Description(0, "x-000-12345678", {}, None, "gs://b/r/x", ("train",)), []
    request = Request(arguments(*TPU_VM, "--retries=0"), expand.Sweep("x", None, [run]), [run], {})
    started = tpu_vm.start(request, dict(os.environ), said.append)
    assert started.code == (code > 0) and started.runs[run.name]["code"] == code
    assert (tmp_path / "calls").exists() == deleted
    command = "queued-resources delete x-000-12345678-"
    assert any(command in line for line in said)  # it was not possible, or not done
    if deleted:
        assert command in (tmp_path / "calls").read_text()
        assert any("PERMISSION_DENIED" in line for line in said)


def test_machines_of_runs_that_had_finished_are_deleted(tmp_path, monkeypatch, gcs):
    """Such as of runs whose launcher lost their connection; not before a run's last file."""
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    root = f"gs://{gcs_server.new_bucket(gcs)}/r"
    (epath.Path(root) / "x1" / "model_card.md").write_text("")
    (epath.Path(root) / "x2" / "config.json").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = [
        expand.Description(i, f"x-00{i}-12345678", {}, None, f"{root}/x{i}", ("train",))
        for i in range(3)
    ]
    listed = " ".join(f"projects/p/locations/z/queuedResources/{r.cloud_name}" for r in runs[1:])
    body = f'echo "$*" >> {tmp_path}/calls; [ "$4" != list ] || printf "%s\\n" {listed}'
    tool(tmp_path, "gcloud", body)
    request = Request(arguments(*TPU_VM), expand.Sweep("x", None, runs), [], {}, finished=runs)
    assert tpu_vm.start(request, dict(os.environ), print).code == 0
    deleted = [c for c in (tmp_path / "calls").read_text().splitlines() if " delete " in c]
    assert len(deleted) == 1 and runs[1].cloud_name in deleted[0]


def test_two_sweeps_of_one_folder_have_a_script_and_a_log_each(tmp_path, monkeypatch):
    """The second one starts while the script of the first waits for its machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu_vm, "script", lambda name, command, **_: f"{name} {command}")
    seen = []

    def take(jobs, *_, **__):
        (job,) = jobs
        seen.append(job)
        return Started(ExitCode.DONE, {job.name: {"state": "done", "code": 0}})

    monkeypatch.setattr(pool, "run_jobs", take)
    tool(tmp_path, "gcloud", "")
    for root in ("gs://b/one", "gs://b/two", "gs://b/one/"):
        found = expand.expand(f"{LAYOUTS}:size=tiny", root)
        request = Request(arguments(*TPU_VM), found, found.runs[:1], {})
        tpu_vm.start(request, dict(os.environ), print)
        script = pathlib.Path(seen[-1].command[-1])
        assert f"{root.rstrip('/')}/{found.runs[0].name}" in script.read_text()
    one, two, again = ((job.directory, job.command) for job in seen)
    assert one == again and one[0] != two[0] and one[1] != two[1]


def test_a_script_that_runs_is_not_changed(tmp_path):
    (path,) = execute.write({"a.sh": "sleep 1; echo old"}, tmp_path)
    process = subprocess.Popen(["bash", path], stdout=subprocess.PIPE, text=True)
    time.sleep(0.3)
    execute.write({"a.sh": "sleep 1; echo new; echo newer"}, tmp_path)
    assert process.communicate()[0] == "old\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.sh"] and os.access(path, os.X_OK)


@pytest.mark.parametrize("words", [XPK, TPU_VM], ids=["xpk", "tpu-vm"])
def test_machines_have_one_name_however_the_root_is_written(words):
    def commands(root):
        found = expand.expand(f"{LAYOUTS}:size=tiny", root)
        args = parser().parse_args(["sweep", "--config=x", f"--workdir={root}", *words])
        return backends.BACKENDS[args.backend].launch(Request(args, found, found.runs, {})).shown

    assert commands("gs://b/r") == commands("gs://b/r/") != commands("gs://b/s")


def test_an_array_has_one_name_however_the_root_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = {
        slurm.job_name("p", f"{tmp_path}/{root}") for root in ("real/s", "link/s", "x/../real/s")
    }
    assert len(names) == 1 and slurm.job_name("p", f"{tmp_path}/link/t") not in names


def test_a_config_that_the_machines_may_not_have_is_named(tmp_path, monkeypatch, capsys):
    """Outside of git, not in it, changed, not pushed; then nothing is said."""
    body = "from localglobal_jax.config import loading\n\ndef get_config(arg=None):\n"
    body += '    return loading.load("coatnet_digits.py:size=tiny")\n\n'
    body += 'def sweep():\n    yield {"seed": 1}\n'
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "runs.py").write_text(body)
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], check=True, capture_output=True)

    def said(config="runs.py"):
        words = ["sweep", f"--config={config}", "--workdir=gs://b/r", "--dry_run", "--json"]
        assert main([*words, "--backend=tpu-vm", "--zone=z", "--tpu_type=v5litepod-16"]) == 0
        printed = capsys.readouterr()
        notices = json.loads(printed.out)["totals"]["notices"]
        assert printed.err.count("notice ") == len(notices)
        return " ".join(notices)

    assert "in no git commit" in said() and "--setup" in said()
    git("init", "-q")
    git("commit", "--allow-empty", "-qm", "first")
    assert "runs.py is not in git" in said()
    git("add", "runs.py")
    git("commit", "-qm", "runs")
    assert said() == ""
    assert str(tmp_path) in said(f"{tmp_path}/a/runs.py")
    (tmp_path / "a" / "runs.py").write_text(body + "\n")
    assert "not committed" in said()
    git("checkout", "-q", "runs.py")
    git("init", "-q", "--bare", str(tmp_path / "remote"))
    git("remote", "add", "origin", str(tmp_path / "remote"))
    assert "no remote branch" in said()
    git("push", "-q", "origin", "HEAD:main")
    git("fetch", "-q")
    assert said() == ""


def described(tmp_path):
    return expand.expand(LAYOUTS, str(tmp_path)).runs


def test_the_head_of_an_sbatch_script(tmp_path):
    found = described(tmp_path)
    runs = [found[i] for i in (0, 1, 2, 5)]
    text = slurm.script(
        runs, {run.name: COMMAND for run in runs}, prefix="p", root="/r", nodes=2, gpus=4,
        concurrent=3, options=["--time=1:00:00"], env=ENV,
    )  # fmt: skip
    head = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        *("--job-name=p", "--array=0-3%3", "--requeue", "--open-mode=append"),
        *("--signal=B:TERM@120", "--output=/r/slurm-%A_%a.txt", "--nodes=2"),
        *("--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00"),
    ]


ENDS = 'touch "$PLACE/ready"; while :; do command -p sleep 0.05; done'


@pytest.mark.parametrize(
    ("body", "code", "following"),
    [
        ("exit 0", 0, "done"),
        ("exit 2", 2, "failed"),
        ("exit 143", 143, "failed"),  # nobody asked it to
        (SAVES, 42, "restart"),
        (ENDS, 143, "stopped"),  # asked before it trained
    ],
)
def test_the_script_of_slurm(body, code, following, tmp_path):
    """A task that saved is put back into the queue, no other; SIGTERM arrives at the run."""
    tool(tmp_path, "srun", f'echo $$ > "$PLACE/pid"\n{body}')
    tool(tmp_path, "scancel", 'kill -TERM "$(cat "$PLACE/pid")"')
    tool(tmp_path, "scontrol", 'echo "$*" > "$PLACE/requeued"')
    tool(tmp_path, "sleep", "")  # of a script that is put back into the queue at once
    run = described(tmp_path)[5]
    text = slurm.script([run], {run.name: COMMAND}, prefix="p", root="/r")
    (tmp_path / "s.sh").write_text(text)
    env = {"PLACE": str(tmp_path), "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7"}
    ready = tmp_path / "ready" if "ready" in body else None
    assert executed(tmp_path / "s.sh", tmp_path, env, ready) == code
    events = pathlib.Path(run.workdir, "attempts.jsonl").read_text().splitlines()
    assert [json.loads(e)["event"] for e in events] == ["start", "end"]
    assert [json.loads(events[1])[key] for key in ("code", "next")] == [code, following]
    assert (tmp_path / "requeued").exists() == (following == "restart")


def test_a_task_that_never_saves_is_not_queued_for_ever(tmp_path):
    """Such as one whose other hosts do not turn up; one that saves goes on."""
    tool(tmp_path, "srun", 'mkdir -p "$SAVES"; touch "$SAVES/files.json"; exit 42')
    tool(tmp_path, "scontrol", 'echo "$*" >> "$PLACE/requeued"')
    tool(tmp_path, "sleep", "")
    run = described(tmp_path)[5]
    text = slurm.script([run], {run.name: COMMAND}, prefix="p", root="/r")
    (tmp_path / "s.sh").write_text(text)
    env = {"PLACE": str(tmp_path), "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7"}
    for start in range(pool.MOST_IDLE + 4):
        number = min(start, 3)  # three steps are saved, then no more
        env["SAVES"] = f"{run.workdir}/checkpoints/{number}"
        assert executed(tmp_path / "s.sh", tmp_path, env) == 42
    times = len((tmp_path / "requeued").read_text().splitlines())
    assert times == pool.MOST_IDLE + 3
    assert status.read(run)["state"] == "failed"


@pytest.mark.parametrize("text", [None, '{"0": "x'])
def test_an_array_whose_runs_are_unknown_is_not_started_twice(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("sbatch", "scontrol"):
        tool(tmp_path, name, f"touch {tmp_path}/{name}.called")
    tool(tmp_path, "squeue", "echo 7001 0")
    runs, root = described(tmp_path / "root"), tmp_path / "root"
    if text:
        root.mkdir()
        (root / "slurm-7001.json").write_text(text)
    words = ["sweep", "--config=x", f"--workdir={root}", "--backend=slurm"]
    request = Request(parser().parse_args(words), expand.Sweep("p", None, runs), runs, {})
    with pytest.raises(ValueError, match="7001"):
        slurm.start(request, dict(os.environ), print)
    assert not (tmp_path / "sbatch.called").exists()


SBATCH = """
echo "$*" >> "$PLACE/calls"
file=${!#}
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$file")
[ "$last" -le 1000 ] || { echo "sbatch: error: Invalid job array specification"; exit 1; }
echo $((100 * $(wc -l < "$PLACE/calls")))
"""


@pytest.mark.parametrize(
    ("config", "sizes"), [("", [1000, 500]), ("MaxArraySize = 501", [501, 501, 498])]
)
def test_a_sweep_larger_than_an_array(config, sizes, tmp_path, monkeypatch):
    """SLURM's limit: indices up to 1000. Every run is in one array, and starts its own command."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    tool(tmp_path, "sbatch", SBATCH)
    tool(tmp_path, "squeue", "")
    tool(tmp_path, "scontrol", f"echo 'Other = 7'; echo '{config}'")
    tool(tmp_path, "srun", 'printf "%s\\n" "$@" > "$PLACE/words"')
    root = tmp_path / "root"
    runs = [
        expand.Description(i, f"p-{i:03d}-1", {}, None, f"{root}/{i}", ("train", f"--run={i}"))
        for i in range(1500)
    ]
    words = ("--backend=slurm", "--slots=2", "--sbatch=exclusive", "--sbatch=--mem=4G")
    args = parser().parse_args(["sweep", "--config=x", f"--workdir={root}", *words])
    request = Request(args, expand.Sweep("p", None, runs), runs, {})
    started = slurm.start(request, dict(os.environ), lambda line: None)
    assert started.code == 0 and {s["state"] for s in started.runs.values()} == {"queued"}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["afterany" in call for call in calls] == [False] + [True] * (len(sizes) - 1)
    seen = []
    for number, file in enumerate(sorted(root.glob("p-*.sbatch"))):
        text = file.read_text()
        assert "#SBATCH --exclusive\n#SBATCH --mem=4G\n" in text
        names = json.loads((root / f"slurm-{100 * (number + 1)}.json").read_text())
        seen += names.values()
        task = max(map(int, names))
        assert task + 1 == sizes[number]
        assert f"#SBATCH --array=0-{task}%2\n" in text
        env = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "7"}
        assert executed(file, tmp_path, env) == 0
        last = f"--run={len(seen) - 1}"
        assert (tmp_path / "words").read_text().splitlines()[-1] == last
    assert seen == [run.name for run in runs]


@pytest.mark.skipif(not shutil.which("xpk"), reason="xpk is not installed")
def test_xpk_takes_our_arguments(tmp_path):
    command = (*COMMAND, "--config.parallel.mesh={'data': -1, 'fsdp': 4}")
    argv = xpk.arguments(
        "n-000-1f2e3d4c", command, cluster="c", tpu_type="v5litepod-16", image="i", project="p",
        zone="us-west4-a",
    )  # fmt: skip
    manifest = tmp_path / "manifest.yaml"
    options = ["--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"]
    env = {**os.environ, "HOME": str(tmp_path)}
    assert subprocess.run([*argv, *options], env=env, check=False).returncode == 0
    assert f"(exec {shell.quoted(command)}) & PID" in manifest.read_text()
