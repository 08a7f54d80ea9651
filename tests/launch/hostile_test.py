# SPDX-License-Identifier: Apache-2.0
"""Names that would run something if a shell read them: the scripts are really executed."""

import os
import pathlib
import shutil
import subprocess

import gcs_server
import pytest
import standins

from localglobal_jax.cli.main import main
from localglobal_jax.launch import expand, shell, slurm, tpu_vm

HOSTILE = (
    *("a; touch PWNED", "$(touch PWNED)", "`touch PWNED`", "a\ntouch PWNED\n", "' ; touch PWNED '"),
    *('" ; touch PWNED "', "a && touch PWNED", "| touch PWNED", "> PWNED", "\\'; touch PWNED #"),
    *("@REMOTE@", "@EXPORTS@; touch PWNED", "'@STOP@'", "${IFS}", "$'\\x3btouch PWNED'", "!!", "*"),
    *("{a,b}", "~", "-rf", "é ü 漢", "%s %n", "&", "EOF\ntouch PWNED\nEOF", "\t", " "),
)
ENV = {f"NOTE_{i}": text for i, text in enumerate(HOSTILE)}
SHOW = 'printf "%s\\0" "$@" > "$PLACE/words"; env -0 > "$PLACE/env"\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with tools that show what they were given; anything executed would write there."""
    monkeypatch.chdir(tmp_path)
    for name, body in {
        "srun": SHOW,
        "localglobal": SHOW,
        "gcloud": standins.GCLOUD,
        "xpk": SHOW,
    }.items():
        standins.tool(tmp_path, name, body)
    standins.host(tmp_path, 0, f"{tmp_path}:{os.environ['PATH']}", PLACE=str(tmp_path))
    return tmp_path


def executed(place, script, **env):
    path = f"{place}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script], cwd=place, env={**os.environ, "PATH": path, "PLACE": str(place), **env},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(place.rglob("PWNED*")), "something was executed"
    return (place / "words").read_text().split("\0")[:-1]


def environment(place):
    pairs = (line.partition("=") for line in (place / "env").read_text().split("\0"))
    return {name: value for name, _, value in pairs if name in ENV}


def test_slurm(place):
    workdir = str(place / "$(touch${IFS}PWNED);touch${IFS}PWNED")
    run = expand.Description(0, "x-000-12345678", {}, None, workdir, ())
    text = slurm.script([run], {run.name: HOSTILE}, prefix="p", root=str(place), env=ENV)
    (place / "s.sh").write_text(text)
    words = executed(place, place / "s.sh", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="7")
    assert words[-len(HOSTILE) :] == list(HOSTILE)
    assert environment(place) == ENV
    assert (pathlib.Path(workdir) / "attempts.jsonl").exists()


def test_tpu_vm(place):
    words = ("localglobal", *HOSTILE)
    text = tpu_vm.script("n", words, zone="z; touch PWNED", accelerator="v4-8", env=ENV)
    (place / "t.sh").write_text(text)
    assert executed(place, place / "t.sh") == list(HOSTILE)
    assert environment(place) == ENV


def test_a_line_break_ends_no_option_of_sbatch(place):
    run = expand.Description(0, "x-000-12345678", {}, None, str(place), ())
    for option in ("--time=1\ntouch PWNED", "--time=1\rtouch PWNED"):
        with pytest.raises(ValueError, match="--time=1"):
            slurm.script([run], {run.name: ("a",)}, prefix="p", root="/r", options=[option])


CONFIG = """
import shutil
from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict(dict(model=dict(name="coatnet", layout="C", depths=(1,), widths=(8,),
        strides=(1,), stem=(8,), stem_stride=1), data=dict(mock=True, dir="x")))
def sweep():
    yield {"data.dir": DIR}
"""


@pytest.mark.parametrize(
    "words",
    [
        ("--backend=slurm", "--partition=$(touch PWNED)"),
        ("--backend=xpk", "--cluster=`touch PWNED`", "--image=i;touch PWNED", "--tpu_type=v4-8"),
        ("--backend=tpu-vm", "--zone=z", "--tpu_type=v4-8", "--setup=: '@COMMAND@'"),
    ],
    ids=["slurm", "xpk", "tpu-vm"],
)
def test_from_a_config_to_the_run(place, words, gcs, monkeypatch, capsys):
    """The whole way: a hostile folder, file name and field -> the script -> the run's words."""
    folder = place / "a; touch PWNED" / "$(touch PWNED)"
    folder.mkdir(parents=True)
    field = "'; touch PWNED; $(touch PWNED) `touch PWNED` \"@REMOTE@"
    file = folder / "x'; touch PWNED.py"
    file.write_text(CONFIG.replace("DIR", repr(field)))
    for key, value in gcs_server.environment(gcs).items():
        monkeypatch.setenv(key, value)
    remote = f"gs://{gcs_server.new_bucket(gcs)}/$(touch${{IFS}}PWNED)"
    root = str(place / "runs") if "slurm" in words[0] else remote
    command = ["sweep", f"--config={file}", f"--workdir={root}", f"--out={place / 'out'}"]
    command += [f"--env=NOTE_{i}={text}" for i, text in enumerate(HOSTILE)]
    assert main([*command, *words]) == 0, capsys.readouterr().err
    (script,) = (place / "out").iterdir()
    found = executed(place, script, SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="7")
    if "xpk" in words[0]:
        assert {f"--env=NOTE_{i}={text}" for i, text in enumerate(HOSTILE)} <= set(found)
        inner = next(w for w in found if w.startswith("--command=")).partition("=")[2]
        (place / "inner.sh").write_text(inner)
        found = executed(place, place / "inner.sh")
    else:
        assert environment(place) == ENV
    assert f"--config.data.dir={field}" in found and str(file) in found
    shutil.rmtree(place / "out")


def test_what_is_secret():
    env = {
        "HTTPS_PROXY": "http://me:hunter2@proxy:3128", "AWS_CREDENTIALS": "hunter3",
        "DB_PASSWD": "hunter4", "GPG_PASSPHRASE": "hunter5", "URL": "http://host:80/a@b",
    }  # fmt: skip
    shown = shell.masked(env)
    assert [name for name, value in shown.items() if value != "***"] == ["URL"]
    assert "hunter" not in "\n".join(shell.exports(env))
    said = shell.without(f"bad request: --env=A={env['AWS_CREDENTIALS']} {env['URL']}", env)
    assert said == f"bad request: --env=A=*** {env['URL']}"
