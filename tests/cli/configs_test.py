# SPDX-License-Identifier: Apache-2.0
"""Configs that come with the package: listed, copied, found by name, and in a wheel."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(file.name for file in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["configs/coatnet_digits.py:size=tiny", "muse_lohelp.py"])
def test_a_config_is_found_by_name_in_any_folder(spec, elsewhere):
    assert loading.load(spec).steps == loading.load(f"{ROOT}/configs/{spec.split('/')[-1]}").steps
    mine = elsewhere / spec.partition(":")[0]
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("from ml_collections import ConfigDict\nget_config = lambda arg=None: "
                    "ConfigDict({'steps': 77})\n")  # fmt: skip
    assert loading.load(spec).steps == 77  # one's own comes first
    with pytest.raises(ValueError, match=r"nowhere/coatnet_digits\.py"):
        loading.load("nowhere/coatnet_digits.py")


def test_configs_are_listed_and_copied(elsewhere, capsys):
    assert main(["configs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [f"configs/{name}" for name in NAMES] and all(found.values())
    assert main(["configs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)
    assert main(["configs", "transformer_lohelp", "--out", "mine.py"]) == 0
    assert capsys.readouterr().out == "mine.py\n"
    assert loading.load("mine.py:size=tiny").steps == 20  # builds on a neighbour left behind
    assert main(["configs", "configs/transformer_lohelp.py", "--out", "mine.py"]) == 2
    assert "mine.py" in capsys.readouterr().err
    assert main(["configs", "coatnet_digit"]) == 2
    assert "coatnet_digits" in capsys.readouterr().err
    assert main(["configs", "--out", "x.py"]) == 2


def test_a_wheel_has_the_configs(tmp_path):
    """Installed from a wheel, the help named configs that were nowhere."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("localglobal_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}

    def localglobal(*args):
        command = [sys.executable, str(site / "bin" / "localglobal"), *args]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(localglobal("configs", "--json"))
    assert list(found) == [f"configs/{name}" for name in NAMES]
    out = localglobal("sweep", "--config", "configs/coatnet_digits.py", "--help")
    assert "--dry_run" in out
    assert localglobal("configs", "finetune_folder").strip() == "finetune_folder.py"
    code = "from localglobal_jax.config import loading; import localglobal_jax; " \
        "print(localglobal_jax.__file__, loading.load('configs/muse_lohelp.py').steps)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.startswith(str(site)) and done.stdout.split()[1] == "2400"
