# SPDX-License-Identifier: Apache-2.0
"""What a sweep no longer needs: listed, deleted with --yes, and never that of a live run."""

import fcntl
import json
import pathlib
import shutil

import gcs_server
import pytest
from etils import epath

from localglobal_jax.checkpoints import reader
from localglobal_jax.cli.main import main
from localglobal_jax.launch import expand, pool, prune

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"""
from localglobal_jax.config import loading

def get_config(arg=None):
    config = loading.load({str(ROOT / "configs/coatnet_digits.py")!r} + ":size=tiny,data=mock")
    config.model.update(layout="T", depths=(1,), widths=(16,), strides=(1,))
    config.batch_size, config.optim.warmup_steps, config.steps = 4, 1, 4
    config.checkpoint = dict(every=1, keep=9, best="-test[:8]/loss")
    config.eval = dict(every=1)
    config.data.eval_splits = ("test[:8]",)
    config.log = dict(tensorboard=False, every=9, tags=("a b", "c"), note="why")
    return config

def sweep():
    for seed in range(4):
        yield {{"seed": seed}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a config, and a finished run of it with four checkpoints."""
    folder = tmp_path_factory.mktemp("prune")
    (folder / "c.py").write_text(CONFIG)
    first = expand.expand(str(folder / "c.py"), str(folder / "runs")).runs[0]
    assert main(list(first.arguments)) == 0
    return folder, pathlib.Path(first.workdir)


@pytest.fixture
def sweep(trained, tmp_path):
    """The command, and the workdirs: one run done, one failed, one stopped, one not started."""
    folder, finished = trained
    root = tmp_path / "runs"
    runs = expand.expand(str(folder / "c.py"), str(root)).runs
    shutil.copytree(finished, runs[0].workdir)
    for run, code in zip(runs[1:3], (3, 42), strict=True):
        shutil.copytree(finished, run.workdir)
        shutil.rmtree(pathlib.Path(run.workdir) / "checkpoints" / "4")
        config = json.loads((finished / "config.json").read_text()) | {"seed": run.run.seed}
        (pathlib.Path(run.workdir) / "config.json").write_text(json.dumps(config))
        events = [{"event": "start", "time": 0}, {"event": "end", "code": code, "time": 1}]
        text = "".join(json.dumps(event) + "\n" for event in events)
        (pathlib.Path(run.workdir) / "attempts.jsonl").write_text(text)
    command = ["sweep", f"--config={folder / 'c.py'}", f"--workdir={root}", "--prune"]
    return command, [pathlib.Path(run.workdir) for run in runs]


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def steps(run):
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def test_it_lists_first_and_deletes_with_yes(sweep, capsys):
    command, (done, failed, stopped, absent) = sweep
    before = names(done.parent)
    assert main([*command, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert names(done.parent) == before
    best = min(
        (line["loss"], -line["step"])
        for line in map(json.loads, (done / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "test[:8]"
    )
    kept = sorted({4, -best[1]})
    gone = [str(done / "checkpoints" / str(s)) for s in range(1, 5) if s not in kept]
    assert [folder["folder"] for folder in listed["folders"]] == [*gone, str(failed)]
    assert listed["bytes"] > 10_000 and listed["freed"] == 0
    assert main([*command, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed"] == listed["bytes"]
    assert steps(done) == kept and not failed.exists() and not absent.exists()
    assert steps(stopped) == [1, 2, 3]
    for step in kept:
        assert reader.read(done, step)[0] == step  # whole
    assert main([*command, "--yes"]) == 0
    assert "0 B" in capsys.readouterr().out


def test_a_pruned_run_keeps_its_newest_and_best_checkpoint(sweep, capsys):
    command, (_, _, stopped, absent) = sweep
    event = json.dumps({"event": "pruned", "step": 3, "time": 2})
    with open(stopped / "attempts.jsonl", "a") as file:
        file.write(f"{event}\n")
    absent.mkdir()  # pruned before it saved
    shutil.copy(stopped / "attempts.jsonl", absent)
    config = json.loads((stopped / "config.json").read_text()) | {"seed": 3}
    (absent / "config.json").write_text(json.dumps(config))
    assert main([*command, "--yes", "--json", "--only", "2-3"]) == 0
    gone = [folder["folder"] for folder in json.loads(capsys.readouterr().out)["folders"]]
    left = steps(stopped)
    assert 3 in left and len(left) <= 2 and len(gone) == 3 - len(left)


@pytest.mark.parametrize("following", ["stopped", "retry"])
def test_a_run_that_a_sweep_starts_again_stays(following, sweep, capsys):
    """It was killed, by the one who stopped the sweep or by a lack of memory."""
    command, (_, failed, *_) = sweep
    event = json.dumps({"event": "end", "code": -15, "next": following, "time": 2})
    with open(failed / "attempts.jsonl", "a") as file:
        file.write(f"{event}\n")
    assert main([*command, "--yes", "--json"]) == 0
    assert steps(failed) == [1, 2, 3]


def test_folders_behind_links_go_with_their_links(sweep, tmp_path, capsys):
    command, (done, failed, *_) = sweep
    for folder in (failed, done / "checkpoints"):
        moved = tmp_path / "disk" / folder.name
        moved.parent.mkdir(exist_ok=True)
        shutil.move(folder, moved)
        folder.symlink_to(moved)
    assert main([*command, "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(folder["disk"] > 1000 for folder in found["folders"]), found
    assert not failed.is_symlink() and not (tmp_path / "disk" / failed.name).exists()
    assert len(steps(done)) <= 2 and (done / "checkpoints").is_symlink()


def test_a_folder_that_cannot_be_deleted_keeps_no_other(sweep, monkeypatch, capsys):
    command, (_, failed, *_) = sweep
    rmtree = shutil.rmtree

    def refuse(path, *words, **options):
        if str(path).endswith("checkpoints/1"):
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *words, **options)

    monkeypatch.setattr(prune.shutil, "rmtree", refuse)
    assert main([*command, "--yes", "--json"]) == 1
    first, *others = json.loads(capsys.readouterr().out)["folders"]
    assert first["state"] == "failed" and "Permission denied" in first["why"]
    assert {folder["state"] for folder in others} == {"deleted"} and not failed.exists()


def test_a_run_that_is_being_written_stays(sweep, capsys):
    command, (done, failed, *_) = sweep
    (failed / "log.txt").touch()
    (done / ".lock").touch()
    with open(failed / "log.txt") as one, open(done / ".lock") as other:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main([*command, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed"] == 0
    assert failed.exists() and steps(done) == [1, 2, 3, 4]


def test_in_a_bucket(sweep, gcs, monkeypatch, capsys):
    command, (done, *_) = sweep
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    root = epath.Path(f"gs://{gcs_server.new_bucket(gcs)}/runs")
    for name in names(done):
        (root / done.name / name).write_bytes((done / name).read_bytes())
    assert main([*command[:2], f"--workdir={root}", "--prune", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed"] > 10_000
    assert 4 in reader.steps(root / done.name) and len(reader.steps(root / done.name)) <= 2
    assert reader.read(root / done.name, 4)[0] == 4


def test_a_failed_run_in_a_bucket_is_deleted_once(sweep, gcs, tmp_path, monkeypatch, capsys):
    command, (_, failed, *_) = sweep
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    root = f"gs://{gcs_server.new_bucket(gcs)}/runs"
    (epath.Path(root) / failed.name / "config.json").write_bytes(
        (failed / "config.json").read_bytes()
    )
    run = expand.expand(command[1].partition("=")[2], root, look=True).runs[1]
    logs = pool.folder(run, "tpu-vm")
    logs.mkdir(parents=True)
    (logs / "attempts.jsonl").write_bytes((failed / "attempts.jsonl").read_bytes())
    words = [*command[:2], f"--workdir={root}", "--prune", "--yes", "--json"]
    for folders in (1, 0):
        assert main(words) == 0
        assert len(json.loads(capsys.readouterr().out)["folders"]) == folders


def test_yes_alone_starts_nothing_and_a_dry_run_deletes_nothing(sweep, capsys):
    command, (done, *_) = sweep
    assert main([*command[:3], "--yes"]) == 2
    assert "--prune" in capsys.readouterr().err
    before = names(done.parent)
    assert main([*command, "--yes", "--dry_run"]) == 2
    assert "--dry_run" in capsys.readouterr().err
    assert main([*command, "--dry_run"]) == 0
    assert names(done.parent) == before


def test_notes_and_tags_are_in_the_table(sweep, tmp_path):
    command, _ = sweep
    assert main([*command[:3], f"--collect={tmp_path / 'x.json'}"]) == 0
    assert json.loads((tmp_path / "x.json").read_text())[0]["note"] == "why"
    assert json.loads((tmp_path / "x.json").read_text())[0]["tags"] == "a b, c"
